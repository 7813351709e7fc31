"""Generation with a running vLLM engine, with one request for each context and the seeds that we promise.

We step the engine ourselves instead of calling ``LLM.generate``, for two reasons. We need the number of
prompt tokens that came from the prefix cache for *each* completion (vLLM reports it only for the completion
that ends last). We also need to end a completion at its first box, or after its thought.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rpt_lightning.compat.vllm.engine import rendered_prompt
from rpt_lightning.objectives.box import FirstBox
from rpt_lightning.objectives.thought import AfterThought, early_end
from rpt_lightning.rollout.engines.base import Sample
from rpt_lightning.types import GenerationRequest, SamplingSettings


@dataclass(slots=True)
class Drawn:
    """A completion in progress. ``num_cached_tokens`` of its prompt came from the prefix cache."""

    end: FirstBox | AfterThought | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0

    @property
    def sample(self) -> Sample:
        return Sample(tuple(self.token_ids), tuple(self.logprobs))


def generate(
    engine: Any,
    requests: Sequence[GenerationRequest],
    *,
    bytes_of: Callable[[int], bytes],
    before_step: Callable[[], None],
    adapter: Any = None,
) -> list[list[Drawn]]:
    """Generate all completions of all requests, in order.

    Args:
        engine: An idle vLLM ``LLMEngine``.
        requests: The requests, served in this order as far as there is room. By then, the cache holds what a
            prompt shares with an earlier one.
        bytes_of: Returns the bytes of a token id, for completions that may end early.
        before_step: Called before each step of the engine. It may raise.
        adapter: vLLM's request for the adapter to generate with. None means without one.
    """
    rows = [[Drawn(early_end(request.sampling)) for _ in range(request.n)] for request in requests]
    parts: dict[str, list[Drawn]] = {}
    try:
        for request, row in zip(requests, rows, strict=True):
            # vLLM can end only whole requests, so a completion that may end early needs its own request. vLLM
            # also refuses several greedy completions in one request.
            is_divided = request.sampling.may_end_early or request.sampling.temperature == 0
            size = 1 if is_divided else request.n
            prompt = rendered_prompt(engine, request.prompt_ids)
            for first in range(0, request.n, size):
                name = str(len(parts))
                parts[name] = row[first : first + size]
                engine.add_request(
                    name,
                    prompt,
                    sampling_params(request.sampling, seed=request.seed + first, n=size),
                    lora_request=adapter,
                )
        while engine.has_unfinished_requests():
            before_step()
            _step(engine, parts, bytes_of)
    except BaseException:
        engine.abort_request(list(parts))  # or the next update could not reset the cache
        raise
    return rows


def _step(engine: Any, parts: dict[str, list[Drawn]], bytes_of: Callable[[int], bytes]) -> None:
    done = []
    for output in engine.step():
        for part in output.outputs:
            drawn = parts[output.request_id][part.index]
            drawn.num_cached_tokens = output.num_cached_tokens
            for token_id, candidates in zip(part.token_ids, part.logprobs, strict=True):
                drawn.token_ids.append(token_id)
                drawn.logprobs.append(candidates[token_id].logprob)
                if drawn.end is not None and drawn.end.completed_by(bytes_of(token_id)):
                    done.append(output.request_id)
    engine.abort_request(done)


def sampling_params(sampling: SamplingSettings, *, seed: int, n: int) -> Any:
    """Return vLLM's sampling parameters. A test checks that completion ``i`` has the seed ``seed + i``."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=n,
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,  # 0 means no limit in vLLM too
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # only the request's own stop tokens end a completion
        logprobs=0,  # only that of the drawn token
        detokenize=False,
        # Each completion reports for itself: first its first token, and all others when it ends. If it may
        # end early, it reports every token.
        output_kind=RequestOutputKind.DELTA,
        stream_interval=1 if sampling.may_end_early else sampling.max_tokens,
    )
