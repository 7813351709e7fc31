"""Rollouts with transformers' own ``generate``, which is slower than vLLM but runs wherever torch does.

Sampling is exact and does not depend on the batch. Each completion has its own generator. Gumbel noise is
added to the log-probs of the distribution and the largest sum is chosen, which draws from that distribution
(Gumbel-max trick, Maddison et al. 2014, arXiv:1411.0030, section 2). Batches still differ by rounding in the
forward pass, which affects only near ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rpt_lightning.rollout.engines import model_copy
from rpt_lightning.rollout.engines.base import EngineDtype, RolloutEngine, Sample, compare_own_copy
from rpt_lightning.types import GenerationRequest, SamplingSettings, TokenIds


class HFEngine(RolloutEngine):
    """An engine that generates with transformers.

    Args:
        dtype: Data type of the engine's copy of the weights.
        device: Device of the copy. "auto" uses CUDA or MPS if available.
        max_batch_tokens: Largest number of prompt and completion tokens in one batch, padding included. It
            limits memory use.
    """

    def __init__(
        self, dtype: EngineDtype = "bfloat16", device: str = "auto", max_batch_tokens: int = 16384
    ) -> None:
        super().__init__(dtype)
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens={max_batch_tokens} must be at least 1")
        self.max_batch_tokens = max_batch_tokens
        self.device = device
        self._model: Any = None

    @property
    def description(self) -> str:
        return (
            f"transformers generate, {self.dtype}, on {self.device}, "
            f"batches of up to {self.max_batch_tokens} tokens"
        )

    def _start(self, model_path: str, seed: int) -> None:
        if self.device == "auto":  # decided here, because the strategy assigns GPUs when the run starts
            self.device = _best_device()
        self._model = model_copy.build_model(model_path, self.dtype, torch.device(self.device))

    def _update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        model_copy.load_weights(self._model, weights)

    def _read_weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        return model_copy.read_weights(self._model, names)

    def _differing_weights(self, wanted: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
        return compare_own_copy(self._read_weights(tuple(wanted)), wanted)

    def _close(self) -> None:
        self._model = None

    def _generate(self, requests: Sequence[GenerationRequest]) -> list[list[Sample]]:
        samples: dict[tuple[int, int], Sample] = {}
        for batch in _batches(requests, self.max_batch_tokens):
            prompts = [requests[row].prompt_ids for row, _ in batch]
            seeds = [requests[row].seed + index for row, index in batch]
            samples.update(
                zip(batch, self._generate_batch(prompts, seeds, requests[batch[0][0]].sampling), strict=True)
            )
        return [[samples[row, index] for index in range(request.n)] for row, request in enumerate(requests)]

    def _generate_batch(
        self, prompts: Sequence[TokenIds], seeds: Sequence[int], sampling: SamplingSettings
    ) -> list[Sample]:
        longest = max(map(len, prompts))
        input_ids = torch.tensor(
            [(0,) * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device
        )  # [N, T], padded on the left
        attention_mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device
        )  # [N, T]
        draw = SeededDraw(sampling, seeds, torch.device(self.device), before_token=self._check_interrupted)
        settings = cast(Any, GenerationConfig)(
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=list(sampling.stop_token_ids) or None,
            pad_token_id=0,
            use_cache=True,
        )
        output = self._model.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([draw]),
        )
        token_ids = cast(Tensor, output)[:, longest:].tolist()  # [N, new tokens]
        logprobs = torch.stack(draw.logprobs, dim=1).tolist()  # [N, new tokens]
        return [
            _until_stop(ids, row, sampling.stop_token_ids)
            for ids, row in zip(token_ids, logprobs, strict=True)
        ]


class SeededDraw(LogitsProcessor):
    """Draw the next token of each row, so that ``generate``'s argmax has only one choice.

    It keeps the log-prob of each token that it draws.

    Args:
        sampling: Temperature 0 takes the most likely token, with its log-prob at temperature 1.
        seeds: [N], for one generator each. Each step advances it by one draw over the whole vocabulary.
        device: Device of the logits. Noise on a GPU differs from noise on a CPU.
        before_token: Called before each draw. It may raise.
    """

    def __init__(
        self,
        sampling: SamplingSettings,
        seeds: Sequence[int],
        device: torch.device,
        *,
        before_token: Callable[[], None] = lambda: None,
    ) -> None:
        self.before_token = before_token
        self.temperature = sampling.temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        # Min-p comes first, as in vLLM.
        self.truncate: Any = LogitsProcessorList()
        if sampling.temperature > 0 and sampling.min_p > 0:
            self.truncate.append(MinPLogitsWarper(sampling.min_p))
        if sampling.temperature > 0 and sampling.top_k > 0:
            self.truncate.append(TopKLogitsWarper(sampling.top_k))
        if sampling.temperature > 0 and sampling.top_p < 1:
            self.truncate.append(TopPLogitsWarper(sampling.top_p))
        self.logprobs: list[Tensor] = []  # one [N] a step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.before_token()
        logits = scores.float()  # [N, V]
        if self.temperature > 0:
            logits = self.truncate(input_ids, logits / self.temperature)
        logprobs = logits.log_softmax(-1)
        chosen = (logprobs + self._gumbel(logprobs) if self.temperature > 0 else logprobs).argmax(
            -1, keepdim=True
        )  # [N, 1]
        self.logprobs.append(logprobs.gather(1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    def _gumbel(self, like: Tensor) -> Tensor:
        noise = torch.empty_like(like)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return -noise.log()  # minus the logarithm of an exponential variable has a Gumbel distribution


def _batches(requests: Sequence[GenerationRequest], max_tokens: int) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of pairs (request, completion index) with one sampling setting and similar length each.

    A batch stays within the token budget unless a single row exceeds it.
    """
    rows = [(row, index) for row, request in enumerate(requests) for index in range(request.n)]
    for sampling in dict.fromkeys(request.sampling for request in requests):
        batch: list[tuple[int, int]] = []
        for row, index in sorted(
            (pair for pair in rows if requests[pair[0]].sampling == sampling),
            key=lambda pair: len(requests[pair[0]].prompt_ids),
        ):
            # In ascending order, so the new row is the longest.
            width = len(requests[row].prompt_ids) + sampling.max_tokens
            if batch and (len(batch) + 1) * width > max_tokens:
                yield batch
                batch = []
            batch.append((row, index))
        yield batch


def _until_stop(token_ids: Sequence[int], logprobs: Sequence[float], stop_token_ids: TokenIds) -> Sample:
    end = next(
        (place + 1 for place, token_id in enumerate(token_ids) if token_id in stop_token_ids), len(token_ids)
    )
    return Sample(tuple(token_ids[:end]), tuple(logprobs[:end]))


def _best_device() -> str:
    if torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"
