"""A stand-in engine for tests and dry runs, which takes its completions from a script and logs all calls.

Only the choice of the completion is not real. The engine holds the weights that it was given, and the
log-probs are those of its own small model. Any comparison of an engine with the policy can therefore run
against it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.pretrained.tokenizer import as_in_folder, read_tokenizer
from rpt_lightning.rollout.engines import model_copy
from rpt_lightning.rollout.engines.base import EngineDtype, RolloutEngine, Sample, compare_own_copy
from rpt_lightning.types import GenerationRequest, TokenIds


class ScriptedEngine(RolloutEngine):
    """An engine that selects scripted completions by a pure function of (seed, prompt, weights).

    Two runs therefore agree exactly as long as their weights agree bit for bit. ``events`` lists what
    happened in order: "start", "update 3", "generate 8 requests" and "close".

    Args:
        completions: The texts to pick from. Each is tokenised as plain text and ends with the request's first
            stop token, or is cut at ``max_tokens``.
        dtype: Data type of the engine's copy of the weights.
    """

    def __init__(self, completions: list[str], dtype: EngineDtype = "float32") -> None:
        super().__init__(dtype)
        if not completions:
            raise ValueError("completions=[] must hold at least one text")
        self.completions = completions
        self.events: list[str] = []
        self._model: Any = None
        self._lines: list[TokenIds] = []
        self._checksum = b""

    @property
    def description(self) -> str:
        return f"a script of {len(self.completions)} lines (for tests: nothing is sampled from the policy)"

    def _start(self, model_path: str, seed: int) -> None:
        self.events.append("start")
        self._model = model_copy.build_model(model_path, self.dtype, torch.device("cpu"))
        token_bytes = TokenBytes(as_in_folder(read_tokenizer(model_path), where=f"tokenizer of {model_path}"))
        self._lines = [token_bytes.encode_plain(text) for text in self.completions]

    def _update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.events.append(f"update {version}")
        model_copy.load_weights(self._model, weights)
        digest = hashlib.sha256()
        for parameter in self._model.parameters():
            digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self._checksum = digest.digest()

    def _read_weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        return model_copy.read_weights(self._model, names)

    def _generate(self, requests: Sequence[GenerationRequest]) -> list[list[Sample]]:
        self.events.append(f"generate {len(requests)} requests")
        return [
            [self._say(request, request.seed + index) for index in range(request.n)] for request in requests
        ]

    def _differing_weights(self, wanted: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
        return compare_own_copy(self._read_weights(tuple(wanted)), wanted)

    def _close(self) -> None:
        self.events.append("close")
        self._model = None

    def _say(self, request: GenerationRequest, seed: int) -> Sample:
        self._check_interrupted()
        choice = hashlib.sha256(repr((seed, request.prompt_ids)).encode() + self._checksum).digest()
        line = self._lines[int.from_bytes(choice[:8], "big") % len(self._lines)]
        token_ids = (line + request.sampling.stop_token_ids[:1])[: request.sampling.max_tokens]
        return Sample(token_ids, self._logprobs(request.prompt_ids, token_ids, request.sampling.temperature))

    @torch.no_grad()
    def _logprobs(self, prompt_ids: TokenIds, token_ids: TokenIds, temperature: float) -> tuple[float, ...]:
        logits = (
            self._model(torch.tensor([prompt_ids + token_ids])).logits[0, len(prompt_ids) - 1 : -1].float()
        )  # [T, V]
        logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
        return tuple(logprobs.gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist())
