"""Client for one vLLM server over HTTP and JSON, with token ids in and out. It does not import vllm.

The server carries a *label* for the weights that it holds (``weight_version`` in vLLM). vLLM reports the
label with every completion, by spans of tokens. After a restart, the server has vLLM's own first label again,
so a completion from lost or half-loaded weights cannot be mistaken for one of ours.
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

from rpt_lightning.rollout.engines.base import Sample
from rpt_lightning.types import GenerationRequest

T = TypeVar("T")
LOADING = "loading"
_PROBE_S = 10.0  # an idle server reports its state within milliseconds
_GONE = -9999.0  # vLLM's value for log-probs that JSON cannot represent (-inf and NaN)


class ServerLost(RuntimeError):
    """This server is gone, hangs or failed at its task. Another server may well succeed."""


class ServerRefused(ValueError):
    """The server rejects our requests: the key is wrong, or `rpt serve` did not start it."""


class Server:
    """A client for one server.

    Args:
        url: Address of the server, such as ``http://10.0.0.5:8000``.
        session: HTTP session that carries the key. It must stay open as long as this object is used.
        timeout_s: Longest time in seconds without an answer from a working server.
        request_timeout_s: Longest time in seconds for the completions of one request.
    """

    def __init__(
        self, url: str, session: aiohttp.ClientSession, *, timeout_s: float, request_timeout_s: float
    ) -> None:
        self.url = url
        self._session = session
        self._timeout_s = timeout_s
        self._request_timeout_s = request_timeout_s

    async def label(self, *, limit_s: float | None = None) -> str:
        """Return the label of the weights it holds, as set by whoever loaded them."""
        answer = await self.call(
            "GET", "/weight_info", limit_s=min(_PROBE_S, self._timeout_s) if limit_s is None else limit_s
        )
        if not isinstance(answer, dict) or "weight_version" not in answer:
            raise ServerRefused(f"{self.url}/weight_info: not an answer of vLLM: {str(answer)[:100]!r}")
        return str(answer["weight_version"])

    async def describe(self) -> dict[str, Any]:
        return (await self.rpc("rpt_describe", limit_s=min(_PROBE_S, self._timeout_s)))[0]

    async def watch(self, label: str, *, every_s: float = 1.0) -> NoReturn:
        """Poll the label. Raise ServerLost if the label changes or the answer takes too long.

        vLLM answers between two steps of generation, so this notices a server that hangs long before its
        requests time out.
        """
        while True:
            await asyncio.sleep(every_s)
            found = await self.label(limit_s=self._timeout_s)
            if found != label:
                raise ServerLost(f"{self.url} now holds weights {found!r}, not {label!r}")

    async def generate(self, request: GenerationRequest, label: str) -> list[Sample]:
        """Generate the completions of a request.

        Raises ServerLost unless all of their tokens come from the weights with this label.
        """
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
            raise ServerLost(f"{self.url} returned {len(samples)} of {request.n} completions")
        return samples * (request.n // len(samples))

    def _sample(self, choice: dict[str, Any], label: str) -> Sample:
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerLost(f"{self.url} ended a completion for the reason {choice['finish_reason']!r}")
        token_ids, spans = choice["token_ids"], choice["weight_versions"]
        if not spans or {span["version"] for span in spans} != {label} or spans[-1]["end"] != len(token_ids):
            raise ServerLost(
                f"{self.url} generated with weights {spans}, not {label!r}: it was "
                "restarted, or someone else changed its weights"
            )
        content = choice["logprobs"]["content"]
        assert [token["token_id"] for token in content] == token_ids
        return Sample(
            tuple(token_ids),
            tuple(token["logprob"] if token["logprob"] > _GONE else float("nan") for token in content),
        )

    async def may_load(self, label: str, *, for_s: float) -> bool:
        """Return whether this rank alone may load these weights.

        Call ``loaded`` afterwards, even after an error.
        """
        answer = await self.rpc(
            "rpt_may_load", limit_s=min(_PROBE_S, self._timeout_s), label=label, for_s=for_s
        )
        return bool(answer[0]["may_load"])

    async def loaded(self) -> None:
        await self.rpc("rpt_loaded", limit_s=min(_PROBE_S, self._timeout_s))

    async def hold(self) -> None:
        """Abort what it generates, accept nothing new, and have no valid label until ``release``."""
        await self.call("POST", "/update_weight_version", {"new_version": LOADING})
        await self.call("POST", "/pause?mode=abort", {})

    async def release(self, label: str) -> None:
        """Clear the cached keys and values of the old weights and generate again."""
        if not (await self.call("POST", "/reset_prefix_cache", {}))["success"]:
            raise ServerLost(f"{self.url} did not reset its prefix cache: a request is still running")
        await self.call("POST", "/resume", {})
        # This comes last, so a server with a valid label is ready. We send it no request before.
        await self.call("POST", "/update_weight_version", {"new_version": label})

    async def checksums(self, names: Sequence[str]) -> dict[str, str]:
        return (await self.rpc("rpt_checksums", names=list(names)))[0]

    async def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return load(base64.b64decode((await self.rpc("rpt_read", names=list(names)))[0]["safetensors"]))

    async def rpc(self, method: str, *, limit_s: float | None = None, **kwargs: Any) -> list[dict[str, Any]]:
        """Call a method of the server's workers (rollout/engines/vllm/worker.py).

        Each worker gives one answer.
        """
        answer = await self.call(
            "POST", "/collective_rpc", {"method": method, "kwargs": kwargs}, limit_s=limit_s
        )
        if not isinstance(answer, dict) or "results" not in answer:
            raise ServerRefused(f"{self.url}/collective_rpc: not an answer of vLLM: {str(answer)[:100]!r}")
        return list(answer["results"])

    async def call(self, verb: str, path: str, body: Any = None, *, limit_s: float | None = None) -> Any:
        """Send one HTTP request.

        Raises:
            ServerLost: There was no answer within ``limit_s`` seconds (None: the server's ``timeout_s``), or
                the server reported an internal error (5xx).
            ServerRefused: Our key is wrong, or the server has no such path. Another try would not help.
            ValueError: The server refuses the request for another reason (4xx), such as a wrong flag.
        """
        limit_s = self._timeout_s if limit_s is None else limit_s
        try:
            async with self._session.request(
                verb, self.url + path, json=body, timeout=aiohttp.ClientTimeout(total=limit_s)
            ) as response:
                status, text = response.status, (await response.read()).decode(errors="replace")
        except TimeoutError as error:
            raise ServerLost(f"{self.url}{path}: no answer within {limit_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLost(f"{self.url}{path}: {error or type(error).__name__}") from error
        if status >= 500:
            raise ServerLost(f"{self.url}{path}: status {status}: {text[:500]}")
        if status == 401:
            raise ServerRefused(
                f"{self.url} refuses our key: rollout.engine.api_key_env or api_key_file must name the key "
                "with which `rpt serve` was started"
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
    """Return the request as vLLM's SamplingParams.

    Completion ``i`` of ``n`` gets the seed ``seed + i`` (vLLM, v1/engine/parallel_sampling.py). A test
    compares the two.
    """
    sampling = request.sampling
    return {
        # Greedy completions are all the same, and vLLM does not allow n > 1 for them.
        "n": request.n if sampling.temperature > 0 else 1,
        "seed": request.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,  # 0 means no limit in vLLM too
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # only the request's own stop tokens end a completion
        "logprobs": 0,  # only that of the drawn token
        "detokenize": False,
    }


class Fleet:
    """All servers of a run.

    Each ``run`` opens new connections, since a server may have been replaced since the last one.
    """

    def __init__(
        self, urls: Sequence[str], *, key: str | None, timeout_s: float, request_timeout_s: float
    ) -> None:
        self.urls = tuple(url.rstrip("/") for url in urls)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._limits = {"timeout_s": timeout_s, "request_timeout_s": request_timeout_s}

    def run(self, work: Callable[[list[Server]], Awaitable[T]]) -> T:
        """Run to its end the coroutine that ``work`` returns for the servers."""

        async def with_session() -> T:
            # There is no limit here. The dispatcher decides how much a server gets at a time.
            async with aiohttp.ClientSession(
                headers=self._headers, connector=aiohttp.TCPConnector(limit=0)
            ) as session:
                return await work([Server(url, session, **self._limits) for url in self.urls])

        return asyncio.run(with_session())
