"""One vLLM server as a client sees it: HTTP, JSON, token ids in and token ids out. It does not import vllm.

The server carries a *label* for the weights that it holds (vLLM: ``weight_version``), which vLLM itself reports back with every completion, by spans of
tokens. A server that was restarted has vLLM's own first label again, so a completion from forgotten or half-loaded weights cannot pass for one of ours.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar

import aiohttp
from safetensors.torch import load
from torch import Tensor

from rpt_lightning.rollout.engine import Sample
from rpt_lightning.types import GenerationRequest

T = TypeVar("T")
LOADING = "loading"
_PROBE_S = 10.0  # an idle server answers a question about its state in milliseconds
_GONE = -9999.0  # vLLM's word for a log-prob that is -inf or NaN, neither of which JSON can say


class ServerLost(RuntimeError):
    """This server is gone, hangs, or failed at what it was asked; another one may well do it."""


class ServerRefused(ValueError):
    """It takes no such question from us: another key, or another program than a server that `rpt serve` started."""


class Server:
    """Args:
    url: Such as ``http://10.0.0.5:8000``.
    session: Carries the key; open as long as this object is used.
    timeout_s: Longest silence, in seconds, of a server that works.
    request_timeout_s: Longest time for one request's completions.
    """

    def __init__(
        self, url: str, session: aiohttp.ClientSession, *, timeout_s: float, request_timeout_s: float
    ) -> None:
        self.url = url
        self._session = session
        self._timeout_s = timeout_s
        self._request_timeout_s = request_timeout_s

    async def label(self, *, limit_s: float | None = None) -> str:
        """The weights it holds, as whoever loaded them called them."""
        answer = await self.call(
            "GET", "/weight_info", limit_s=min(_PROBE_S, self._timeout_s) if limit_s is None else limit_s
        )
        if not isinstance(answer, dict) or "weight_version" not in answer:
            raise ServerRefused(f"{self.url}/weight_info: not an answer of vLLM: {str(answer)[:100]!r}")
        return str(answer["weight_version"])

    async def describe(self) -> dict[str, Any]:
        return (await self.rpc("rpt_describe", limit_s=min(_PROBE_S, self._timeout_s)))[0]

    async def watch(self, label: str, *, every_s: float = 1.0) -> NoReturn:
        """Asks for the label again and again; ends with ServerLost when the answer is another one, or takes too long.

        vLLM answers between two steps of generation, so a server that hangs shows here long before its requests would run out of time.
        """
        while True:
            await asyncio.sleep(every_s)
            found = await self.label(limit_s=self._timeout_s)
            if found != label:
                raise ServerLost(f"{self.url} holds weights {found!r} now, not {label!r}")

    async def generate(self, request: GenerationRequest, label: str) -> list[Sample]:
        """The request's completions; ServerLost where not all of their tokens are from the weights of this label."""
        body: dict[str, Any] = {
            "token_ids": list(request.prompt_ids),
            "sampling_params": sampling_json(request),
        }
        answer = await self.call("POST", "/inference/v1/generate", body, limit_s=self._request_timeout_s)
        samples = [
            self._sample(choice, label)
            for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
        ]
        if len(samples) != body["sampling_params"]["n"]:
            raise ServerLost(f"{self.url} gave {len(samples)} of {request.n} completions")
        return samples * (request.n // len(samples))

    def _sample(self, choice: dict[str, Any], label: str) -> Sample:
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerLost(f"{self.url} ended a completion for the reason {choice['finish_reason']!r}")
        token_ids, spans = choice["token_ids"], choice["weight_versions"]
        if not spans or {span["version"] for span in spans} != {label} or spans[-1]["end"] != len(token_ids):
            raise ServerLost(
                f"{self.url} generated with weights {spans}, not {label!r}: it was restarted, or someone else changed its weights"
            )
        content = choice["logprobs"]["content"]
        assert [token["token_id"] for token in content] == token_ids
        return Sample(
            tuple(token_ids),
            tuple(token["logprob"] if token["logprob"] > _GONE else float("nan") for token in content),
        )

    async def may_load(self, label: str, *, for_s: float) -> bool:
        """Whether this is the only rank that brings these weights in. Say ``loaded`` afterwards, whatever came of it."""
        answer = await self.rpc(
            "rpt_may_load", limit_s=min(_PROBE_S, self._timeout_s), label=label, for_s=for_s
        )
        return bool(answer[0]["may_load"])

    async def loaded(self) -> None:
        await self.rpc("rpt_loaded", limit_s=min(_PROBE_S, self._timeout_s))

    async def hold(self) -> None:
        """Ends what it generates, takes no more, and has no valid label until ``release``."""
        await self.call("POST", "/update_weight_version", {"new_version": LOADING})
        await self.call("POST", "/pause?mode=abort", {})

    async def release(self, label: str) -> None:
        """Forgets cached keys and values of the old weights and generates again."""
        if not (await self.call("POST", "/reset_prefix_cache", {}))["success"]:
            raise ServerLost(f"{self.url} did not reset its prefix cache: a request is still running")
        await self.call("POST", "/resume", {})
        # Last of all, so that a server with a valid label is ready: none of ours is sent before.
        await self.call("POST", "/update_weight_version", {"new_version": label})

    async def checksums(self, names: Sequence[str]) -> dict[str, str]:
        return (await self.rpc("rpt_checksums", names=list(names)))[0]

    async def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return load(base64.b64decode((await self.rpc("rpt_read", names=list(names)))[0]["safetensors"]))

    async def rpc(self, method: str, *, limit_s: float | None = None, **kwargs: Any) -> list[dict[str, Any]]:
        """Calls a method of the server's workers (rollout/vllm_worker.py); one answer a worker."""
        answer = await self.call(
            "POST", "/collective_rpc", {"method": method, "kwargs": kwargs}, limit_s=limit_s
        )
        if not isinstance(answer, dict) or "results" not in answer:
            raise ServerRefused(f"{self.url}/collective_rpc: not an answer of vLLM: {str(answer)[:100]!r}")
        return list(answer["results"])

    async def call(self, verb: str, path: str, body: Any = None, *, limit_s: float | None = None) -> Any:
        """One HTTP request.

        Raises:
            ServerLost: No answer within ``limit_s`` seconds (None: the server's ``timeout_s``), or an answer that says it broke down (5xx).
            ServerRefused: Our key is wrong, or it has no such path: another try would not mend it.
            ValueError: It refuses what we ask for another reason (4xx): a wrong flag.
        """
        limit_s = self._timeout_s if limit_s is None else limit_s
        try:
            async with self._session.request(
                verb, self.url + path, json=body, timeout=aiohttp.ClientTimeout(total=limit_s)
            ) as response:
                status, text = response.status, (await response.read()).decode(errors="replace")
        except asyncio.TimeoutError as error:
            raise ServerLost(f"{self.url}{path}: no answer within {limit_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLost(f"{self.url}{path}: {error or type(error).__name__}") from error
        if status >= 500:
            raise ServerLost(f"{self.url}{path}: status {status}: {text[:500]}")
        if status == 401:
            raise ServerRefused(
                f"{self.url} refuses our key: rollout.engine.api_key_env or api_key_file must name the key that `rpt serve` was started with"
            )
        if status >= 400:
            kind = ServerRefused if status in (403, 404, 405) else ValueError
            raise kind(
                f"{self.url}{path}: status {status}: {text[:500]} (was this server started by `rpt serve`?)"
            )
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ServerLost(f"{self.url}{path}: not an answer of vLLM: {text[:100]!r}") from error


def sampling_json(request: GenerationRequest) -> dict[str, Any]:
    """vLLM's SamplingParams. Completion ``i`` of ``n`` gets the seed ``seed + i`` (vLLM, v1/engine/parallel_sampling.py; a test compares)."""
    sampling = request.sampling
    return {
        "n": request.n
        if sampling.temperature > 0
        else 1,  # greedy completions are all the same, and vLLM refuses to repeat itself
        "seed": request.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,  # 0 means no limit here too
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # only the request's own stop tokens stop
        "logprobs": 0,  # the drawn token's only
        "detokenize": False,
    }


class Fleet:
    """All servers of a run. Each ``run`` opens its connections anew: between two of them a server may have been replaced."""

    def __init__(
        self, urls: Sequence[str], *, key: str | None, timeout_s: float, request_timeout_s: float
    ) -> None:
        self.urls = tuple(url.rstrip("/") for url in urls)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._limits = {"timeout_s": timeout_s, "request_timeout_s": request_timeout_s}

    def run(self, work: Callable[[list[Server]], Awaitable[T]]) -> T:
        """Runs the coroutine that ``work`` makes of the servers, to its end."""

        async def with_session() -> T:
            # No limit here: how much one server gets at a time is decided where requests are given out.
            async with aiohttp.ClientSession(
                headers=self._headers, connector=aiohttp.TCPConnector(limit=0)
            ) as session:
                return await work([Server(url, session, **self._limits) for url in self.urls])

        return asyncio.run(with_session())
