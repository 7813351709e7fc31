"""The seed of every completion, and random numbers that belong to tasks."""

from __future__ import annotations

import hashlib

MAX_SEED = 2**63 - 1  # vLLM passes seeds as signed 64-bit numbers
_ROOM = 2**20  # largest number of completions of one task with one policy


def request_seed(run_seed: int, policy_version: int, task_id: str, first_index: int = 0) -> int:
    """Return the seed of completion ``first_index`` of a task. Each further completion adds 1 to the seed.

    The seed depends on nothing else (not on batch, rank or Python's hash seed), so a group may be drawn in
    parts. Seeds of different requests are 63-bit hashes. torch's CPU generator uses only the low 32 bits,
    which are hashed as well as the others. In steps of 256 x 8, two requests draw the same noise about once
    in 8,000 steps. This does no harm, since their prompts differ.

    >>> request_seed(1, 0, "doc-7:4", 3) - request_seed(1, 0, "doc-7:4")
    3
    """
    if not 0 <= first_index < _ROOM:
        raise ValueError(f"first_index={first_index} must lie between 0 and {_ROOM - 1}")
    digest = hashlib.sha256(repr((run_seed, policy_version, task_id)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % (MAX_SEED - _ROOM) + first_index


def task_uniform(run_seed: int, policy_version: int, task_id: str) -> float:
    """Return a number in [0, 1) that depends only on its arguments. It is unrelated to completions' seeds.

    >>> task_uniform(1, 0, "doc-7:4") == task_uniform(1, 0, "doc-7:4") != task_uniform(1, 1, "doc-7:4")
    True
    """
    digest = hashlib.sha256(repr(("accept", run_seed, policy_version, task_id)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
