"""Checks after every update of the weights that the engine holds the policy's.

1. Version: the engine acknowledged the policy's version.
2. Tensors: a few tensors are read back from the engine. They must equal the policy's, rounded to the engine's
   dtype, bit for bit. One optimizer step at a learning rate of 1e-6 is far below what log-probs in bf16 can
   show. Rounding to bf16 hides most of such a step too: in a tiny model 4 % of the matrices' entries change
   and no norm does. Tensors that are equal after rounding are genuinely what the engine should compute with,
   whichever step they come from; the version still tells the steps apart. Only some columns of embedding and
   head are read. Read whole, they took a third of the weight sync (rollout/weight_sync/weight_part.py).
3. Log-probs: the engine's log-probs of its own completions are compared with the policy's (logprob_diff.py).
   This finds errors that tensors cannot show: another rotary base, a wrong temperature, a stale prefix cache,
   a kernel that computes something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import Tensor

from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.weight_sync.weight_part import part_name, split_part, take
from rpt_lightning.training.engine_check.logprob_diff import LogprobDiff, LogprobLimits, exceeded

Culprit = Literal["engine", "policy", "folder"]


class SyncError(RuntimeError):
    """Engine and policy disagree, so training would treat the engine's completions as the policy's own.

    ``culprit`` is the one that is wrong: the engine, the policy's own way of computing, or the model's
    folder.
    """

    def __init__(self, message: str, *, culprit: Culprit = "engine") -> None:
        super().__init__(message)
        self.culprit = culprit


NUM_TENSORS = 8  # compared at a time, besides embedding and head


def sampled_names(names: Sequence[str], turn: int, num_tensors: int = NUM_TENSORS) -> tuple[str, ...]:
    """Names of the tensors to compare: always embedding and head, and the next ``num_tensors`` of the others.

    So ``len(names) / num_tensors`` consecutive turns cover every tensor.
    """
    ends = [name for name in names if _is_end(name)]
    others = [name for name in names if name not in ends]
    first = turn * num_tensors
    return (*ends, *[others[(first + place) % len(others)] for place in range(min(num_tensors, len(others)))])


def sampled_columns(width: int, turn: int, num_slices: int) -> slice:
    """Columns of embedding and head to compare. ``num_slices`` consecutive turns cover all of them."""
    size = -(-width // num_slices)
    first = turn % -(-width // size) * size
    return slice(first, min(first + size, width))


def check_weights(
    engine: RolloutEngine,
    weights: Iterable[tuple[str, Tensor]],
    *,
    version: int,
    turn: int = 0,
    num_tensors: int = NUM_TENSORS,
    num_slices: int = 8,
) -> None:
    """Check version and tensors (questions 1 and 2).

    Args:
        engine: The engine after the update.
        weights: The policy's weights, under Hugging Face names; those of ``sampled_names`` are enough. Always
            read to the end, since gathering sharded weights is a collective.
        version: The policy's version.
        turn: Number of earlier checks. The version would not do, since it may advance in strides that skip
            some tensors forever.
        num_tensors: Number of tensors to compare besides embedding and head.
        num_slices: Embedding and head are compared in one of this many slices of their columns.

    Raises:
        SyncError: Version or tensors differ.
    """
    names = sampled_names(engine.weight_names, turn, num_tensors)
    wanted = {}
    for name, tensor in weights:
        if name in names:
            columns = (
                sampled_columns(tensor.shape[1], turn, num_slices)
                if _is_end(name) and tensor.ndim == 2
                else None
            )
            part = name if columns is None else part_name(name, columns)
            wanted[part] = take(tensor.detach(), columns).to("cpu", engine.dtype, copy=True)
    found = {split_part(part)[0] for part in wanted}
    if engine.version != version:
        raise SyncError(
            f"the policy is at version {version}, the engine at {engine.version}: "
            "the last update of the engine's weights is missing or failed"
        )
    differing = engine.differing_weights(wanted)
    copy, wrong = next(iter(differing.items()), ("", ()))
    held = engine.read_weights(wrong[:3]) if wrong else {}
    missing = [f"{name} (the policy has no such weight)" for name in names if name not in found]
    if wrong or missing:
        raise SyncError(
            f"version {version}: {len(wrong) + len(missing)} of {len(names)} compared tensors differ between "
            f"engine and policy ({engine.dtype})"
            + (f", in {copy}" if copy else "")
            + ": "
            + "; ".join([*missing[:3], *[_difference(name, held[name], wanted[name]) for name in wrong[:3]]])
            + ". The engine holds other weights than the policy, so its completions must not be trained on"
        )


def check_adapter(engine: RolloutEngine, adapter: Mapping[str, Tensor], *, version: int) -> None:
    """Check all tensors of an adapter that the engine multiplies beside its weights. Raises SyncError.

    Args:
        engine: The engine after the update.
        adapter: A and s B as they were sent.
        version: The policy's version.
    """
    wanted = {name: tensor.to("cpu", engine.dtype, copy=True) for name, tensor in adapter.items()}
    if wrong := engine.differing_adapter(wanted):
        raise SyncError(
            f"version {version}: {len(wrong)} of {len(wanted)} tensors of the adapter differ between engine "
            f"and policy ({engine.dtype}), such as {', '.join(wrong[:3])}. The engine holds another adapter "
            "than the policy, so its completions must not be trained on"
        )


def check_logprobs(diff: LogprobDiff, limits: LogprobLimits, *, version: int) -> None:
    """Check log-probs (question 3). Raises SyncError."""
    if over := exceeded(diff, limits):
        raise SyncError(
            f"version {version}: log-probs of engine and policy differ too much, in nats: {', '.join(over)}. "
            "Either the engine computes with other weights, another temperature or a stale cache, or the "
            "limits are too tight for this model: raise them only after looking"
        )


def _is_end(name: str) -> bool:
    return "embed" in name or "lm_head" in name


def _difference(name: str, held: Tensor, wanted: Tensor) -> str:
    largest = (held.float() - wanted.float()).abs().max().item()
    return (
        f"{name} (largest difference {largest:.2g}, "
        f"{(held != wanted).sum().item()} of {held.numel()} entries)"
    )
