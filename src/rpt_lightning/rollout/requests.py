"""Checks of a generation request that all engines share."""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.rollout.seeds import MAX_SEED
from rpt_lightning.types import GenerationRequest


def check_requests(requests: Sequence[GenerationRequest], *, max_model_len: int) -> None:
    """Raise ValueError for the first request that an engine of this length cannot serve."""
    for request in requests:
        problem = _problem(request, max_model_len)
        if problem:
            raise ValueError(f"request for task {request.task_id!r}: {problem}")


def _problem(request: GenerationRequest, max_model_len: int) -> str | None:
    sampling, prompt_len = request.sampling, len(request.prompt_ids)
    if prompt_len == 0:
        return "the prompt is empty"
    if sampling.max_tokens < 1:
        return f"max_tokens={sampling.max_tokens} must be at least 1"
    if prompt_len + sampling.max_tokens > max_model_len:
        return (
            f"a prompt of {prompt_len} tokens and max_tokens={sampling.max_tokens} exceed "
            f"max_model_len={max_model_len}; shorten the context or max_tokens, or raise max_model_len"
        )
    if request.n < 1:
        return f"n={request.n} must be at least 1"
    if not 0 <= request.seed <= MAX_SEED - (request.n - 1):
        return (
            f"seed={request.seed} must lie between 0 and {MAX_SEED} for each of its {request.n} completions"
        )
    if not 0 <= sampling.temperature <= 2:
        return f"temperature={sampling.temperature} must lie between 0 (greedy) and 2 (vLLM's limit)"
    if not 0 < sampling.top_p <= 1:
        return f"top_p={sampling.top_p} must lie in (0, 1]"
    if sampling.top_k < 0:
        return f"top_k={sampling.top_k} must not be negative (0: no limit)"
    if not 0 <= sampling.min_p <= 1:
        return f"min_p={sampling.min_p} must lie in [0, 1]"
    return None
