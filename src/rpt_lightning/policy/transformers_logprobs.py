"""Log-probs as transformers itself computes them from the policy's weights.

They are the reference for the policy's own way of computing. There is no tree, packing, chunking of the
vocabulary or autocast. Each sequence passes alone through the model's own ``forward``, with its usual
attention. The weights stay where they are, since a second copy of a large model would not fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from rpt_lightning.compat.transformers import attention_name, supports_sdpa
from rpt_lightning.policy.model import Policy
from rpt_lightning.types import TrainSequence


@torch.no_grad()
def plain_logprobs(
    policy: Policy, sequence: TrainSequence, places: Tensor, *, temperature: float, device: torch.device
) -> Tensor:
    """Return the log-probs of the target tokens at the ascending ``places`` [K].

    They are of the tempered distribution, have shape [K] and the dtype of the model's logits. ``device`` is
    where the policy computes. With sharded weights this is a collective.
    """
    with _plain_forward(policy, device):
        return cast(Tensor, policy(sequence, places, temperature))


@contextmanager
def _plain_forward(policy: Policy, device: torch.device) -> Iterator[None]:
    """Make the policy compute as transformers does.

    The calls go through the policy's own ``__call__``, which gathers sharded weights.
    """
    model: Any = policy.model
    attention, before = attention_name(model), vars(policy).get("forward")

    def forward(sequence: TrainSequence, places: Tensor, temperature: float) -> Tensor:
        ids = torch.tensor([sequence.prompt_ids + sequence.target_ids], device=device)
        kept = (len(sequence.prompt_ids) - 1 + places).to(device)  # the positions that predict these tokens
        takes_places = "logits_to_keep" in inspect.signature(model.forward).parameters
        with torch.autocast(device.type, enabled=False):
            logits = model(
                input_ids=ids[:, :-1], use_cache=False, **({"logits_to_keep": kept} if takes_places else {})
            ).logits[0]
        logits = logits if takes_places else logits[kept]  # [K, V]
        dtype = logits.dtype
        logprobs = (logits.float() / temperature).log_softmax(-1)
        return logprobs.gather(-1, ids[0, kept + 1, None])[:, 0].to(dtype)

    policy.forward = forward  # type: ignore[assignment,method-assign]
    model.set_attn_implementation("sdpa" if supports_sdpa(model) else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        if before is None:
            del policy.forward
        else:
            policy.forward = before  # type: ignore[method-assign]
