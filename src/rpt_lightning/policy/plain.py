"""Log-probs as transformers itself computes them from the policy's weights: what the policy's own way of computing is held against.

No tree, no packing, no chunks of the vocabulary, no autocast: one sequence at a time through the model's own ``forward``, by its usual
attention. The weights stay where they are, since a second copy of a large model would not fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from rpt_lightning.policy.model import Policy
from rpt_lightning.types import TrainSequence


@torch.no_grad()
def plain_logprobs(
    policy: Policy, sequence: TrainSequence, places: Tensor, *, temperature: float, device: torch.device
) -> Tensor:
    """Of the target tokens at ``places`` [K], ascending: log-probs [K] of the tempered distribution, in the dtype of the model's logits.

    ``device`` is where the policy computes. With sharded weights a collective.
    """
    with _plain_forward(policy, device):
        return cast(Tensor, policy(sequence, places, temperature))


@contextmanager
def _plain_forward(policy: Policy, device: torch.device) -> Iterator[None]:
    """The policy computes as transformers does. Through its own ``__call__``, by which sharded weights are gathered."""
    model: Any = policy.model
    attention, before = model.config._attn_implementation, vars(policy).get("forward")

    def forward(sequence: TrainSequence, places: Tensor, temperature: float) -> Tensor:
        ids = torch.tensor([sequence.prompt_ids + sequence.target_ids], device=device)
        kept = (len(sequence.prompt_ids) - 1 + places).to(device)  # where each of those tokens is predicted
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
    model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        if before is None:
            del policy.forward
        else:
            policy.forward = before  # type: ignore[method-assign]
