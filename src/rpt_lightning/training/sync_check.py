"""Does the engine hold the policy's weights? Three questions after every update of the weights.

1. Version: the engine acknowledged the policy's version.
2. Tensors: a few of them, read back from the engine, are equal to the policy's rounded to the engine's dtype, bit for bit. One
   optimizer step at a learning rate of 1e-6 is far below what log-probs in bf16 can show. Rounding to bf16 hides most of such a
   step too: of a tiny model 4 % of the matrices' entries move and no norm does. Tensors that are equal after rounding are
   genuinely what the engine should compute with, whichever step they come from; the version still tells the steps apart.
   Of embedding and head some columns: read whole, they took a third of a hand-over (rollout/weight_part.py).
3. Log-probs: the engine's of its own completions against the policy's (logprob_diff.py). This sees what a tensor cannot: another
   rotary base, a wrong temperature, a stale prefix cache, a kernel that computes something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from rpt_lightning.rollout.engine import RolloutEngine
from rpt_lightning.rollout.weight_part import part_name, split_part, take
from rpt_lightning.training.logprob_diff import LogprobDiff, LogprobLimits, exceeded

Culprit = Literal["engine", "policy", "folder"]


class SyncError(RuntimeError):
    """Engine and policy disagree: what the engine generates would be trained as if the policy had said it.

    ``culprit`` is what computes or says something else: the engine, the policy's own way of computing, or the model's folder.
    """

    def __init__(self, message: str, *, culprit: Culprit = "engine") -> None:
        super().__init__(message)
        self.culprit = culprit


NUM_TENSORS = 8  # that are compared at a time, besides embedding and head


def sampled_names(names: Sequence[str], turn: int, num_tensors: int = NUM_TENSORS) -> tuple[str, ...]:
    """Which tensors to look at: always embedding and head, and ``num_tensors`` of the others, the next ones with each turn.

    So ``len(names) / num_tensors`` turns in a row look at every tensor.
    """
    ends = [name for name in names if _is_end(name)]
    others = [name for name in names if name not in ends]
    first = turn * num_tensors
    return (*ends, *[others[(first + place) % len(others)] for place in range(min(num_tensors, len(others)))])


def sampled_columns(width: int, turn: int, num_slices: int) -> slice:
    """Which columns of embedding and head to look at, the next ones with each turn: all of them in ``num_slices`` turns in a row."""
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
    """Questions 1 and 2.

    Args:
        engine: After the update.
        weights: The policy's, under Hugging Face names; those of ``sampled_names`` are enough. Read to the end, since gathering sharded weights is a
            collective.
        version: The policy's.
        turn: Number of checks before this one. Not the version, which may advance in strides that skip some tensors forever.
        num_tensors: How many are compared besides embedding and head.
        num_slices: Embedding and head are compared in one of so many slices of their columns.

    Raises SyncError.
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
            f"the policy is at version {version}, the engine at {engine.version}: the last update of the engine's weights is missing or failed"
        )
    differing = engine.differing_weights(wanted)
    copy, wrong = next(iter(differing.items()), ("", ()))
    held = engine.read_weights(wrong[:3]) if wrong else {}
    missing = [f"{name} (the policy has no such weight)" for name in names if name not in found]
    if wrong or missing:
        raise SyncError(
            f"version {version}: {len(wrong) + len(missing)} of {len(names)} compared tensors differ between engine and policy ({engine.dtype})"
            + (f", in {copy}" if copy else "")
            + ": "
            + "; ".join([*missing[:3], *[_difference(name, held[name], wanted[name]) for name in wrong[:3]]])
            + ". The engine holds other weights than the policy; its completions must not be trained on"
        )


def check_logprobs(diff: LogprobDiff, limits: LogprobLimits, *, version: int) -> None:
    """Question 3. Raises SyncError."""
    if over := exceeded(diff, limits):
        raise SyncError(
            f"version {version}: log-probs of engine and policy differ too much, in nats: {', '.join(over)}. Either the engine computes "
            "with other weights, another temperature or a stale cache, or the limits are too tight for this model: raise them only after looking"
        )


def _is_end(name: str) -> bool:
    return "embed" in name or "lm_head" in name


def _difference(name: str, held: Tensor, wanted: Tensor) -> str:
    largest = (held.float() - wanted.float()).abs().max().item()
    return f"{name} (largest difference {largest:.2g}, {(held != wanted).sum().item()} of {held.numel()} entries)"
