"""Check the result of an engine's ``_generate``.

Each error names the class, what it returned and what is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rpt_lightning.types import GenerationRequest

WANTED = (
    "wanted: a list with a list for each request, of as many Sample(token_ids, logprobs) as its n, each with "
    "the token ids and log-probs of one completion"
)


def check_samples(engine_name: str, rows: Any, requests: Sequence[GenerationRequest]) -> None:
    """Raise ValueError if ``rows`` is not a valid result for the requests."""
    start = f"the engine {engine_name} returned"
    if not isinstance(rows, (list, tuple)):
        raise ValueError(f"{start} {_said(rows)} for {len(requests)} requests; {WANTED}")
    if len(rows) != len(requests):
        raise ValueError(f"{start} {len(rows)} lists for {len(requests)} requests; {WANTED}")
    for request, row in zip(requests, rows, strict=True):
        start_of_task = f"{start} for task {request.task_id!r}"
        if not isinstance(row, (list, tuple)):
            raise ValueError(f"{start_of_task} {_said(row)}; {WANTED}")
        if len(row) != request.n:
            raise ValueError(f"{start_of_task} {len(row)} completions of {request.n}; {WANTED}")
        for sample in row:
            _check_sample(sample, start_of_task)


def _check_sample(sample: Any, start: str) -> None:
    ids, logprobs = getattr(sample, "token_ids", None), getattr(sample, "logprobs", None)
    if not isinstance(ids, tuple) or not isinstance(logprobs, tuple):
        raise ValueError(f"{start} {_said(sample)} as a completion; {WANTED}, both as tuples")
    if not ids or len(ids) != len(logprobs):
        raise ValueError(
            f"{start} a completion of {len(ids)} tokens with "
            f"{len(logprobs)} log-probs; {WANTED}, at least one of each"
        )
    if type(ids[0]) is not int or not isinstance(logprobs[0], float):
        raise ValueError(
            f"{start} a completion of {type(ids[0]).__name__} and "
            f"{type(logprobs[0]).__name__}; {WANTED}, as int and float"
        )


def _said(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
