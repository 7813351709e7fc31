"""Which packing a model family can take, found out by comparing with the model's own separate log-probs rather than by a list of names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rpt_lightning.policy.packing import PackedTree, pack
from rpt_lightning.policy.row_packing import pack_rows
from rpt_lightning.policy.tree_attention import NAME
from rpt_lightning.types import TrainSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rpt_lightning.policy.model import Policy

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
SEQUENCES = (TrainSequence(prompt_ids=(3, 4), target_ids=(5, 6, 7)), TrainSequence(prompt_ids=(3, 4), target_ids=(8, 9, 7)))
TOLERANCE = 1e-3  # nats; a wrong mask or a scaled head is off by far more


@torch.no_grad()
def choose_packing(policy: Policy) -> str | None:
    """Sets the model up for trees, and returns None; or, where its layers cannot take a tree, for rows, and returns why.

    Raises:
        ValueError: Our own head gives other log-probs than the model's, so that neither packing would be right.
    """
    model = policy.model
    # A window as in the configuration would not be noticed on a few tokens; one of 2 is.
    with _narrow_windows(model):
        model.set_attn_implementation("eager")
        expected = _alone(model)
        reason = _why_no_trees(policy, expected)
        if reason is None:
            return None
        # sdpa leaves out what the attention of trees refuses as well (capped scores, sinks); linear attention has few layers that would gain by it.
        model.set_attn_implementation("eager")
        policy.shares_prefixes = False
        difference = _largest_difference(policy, pack_rows(SEQUENCES, max_tokens=16), expected)
    if difference > TOLERANCE:
        raise ValueError(
            f"policy.path={policy.path}: {type(model).__name__} gives other log-probs than its hidden states and output head (difference {difference:.2g} "
            f"nats; {reason}): it scales its logits behind the head, say; use a model of the Llama, Qwen2 or Qwen3 family"
        )
    return reason


def _why_no_trees(policy: Policy, expected: Tensor) -> str | None:
    kinds = set(getattr(policy.config.get_text_config(), "layer_types", None) or ATTENTION_LAYERS)
    if not kinds <= ATTENTION_LAYERS:
        return f"it has layers with {', '.join(sorted(kinds - ATTENTION_LAYERS))}"
    try:
        policy.model.set_attn_implementation(NAME)
        difference = _largest_difference(policy, pack(SEQUENCES, max_tokens=16), expected)
    except (ValueError, TypeError) as error:
        return str(error)
    return f"packed as a tree its log-probs differ by {difference:.2g} nats" if difference > TOLERANCE else None


def _alone(model: PreTrainedModel) -> Tensor:
    """Log-probs of each sequence's targets from the model's own logits, [2, 3]."""
    rows = []
    for sequence in SEQUENCES:
        ids = torch.tensor([sequence.prompt_ids + sequence.target_ids], device=model.device)
        logprobs = model(input_ids=ids, use_cache=False).logits[0, 1:-1].float().log_softmax(-1)
        rows.append(logprobs.gather(-1, ids[0, 2:, None])[:, 0])
    return torch.stack(rows)


def _largest_difference(policy: Policy, trees: Iterator[PackedTree], expected: Tensor) -> float:
    (tree,) = trees
    rows = tree.unpack(policy(tree.to(expected.device))[0])
    return (rows - expected[list(tree.sequence_indices)]).abs().max().item()


@contextmanager
def _narrow_windows(model: PreTrainedModel, window: int = 2) -> Iterator[None]:
    """Sliding windows of so many tokens, where there are any."""
    owners: Sequence[object] = [model.config, model.config.get_text_config(), *model.modules()]
    found = [(owner, value) for owner in owners if isinstance(value := getattr(owner, "sliding_window", None), int)]
    for owner, _ in found:
        owner.sliding_window = window  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for owner, value in reversed(found):
            owner.sliding_window = value  # type: ignore[attr-defined]
