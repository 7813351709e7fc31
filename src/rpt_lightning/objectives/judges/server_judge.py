"""A judge on a server with OpenAI's chat completions API, such as a vLLM server."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rpt_lightning.objectives.judges.segment_judge import SegmentJudge

FLAG = "--rollout.objective.reward.judge"
RETRY_S = 1.0  # before the second attempt at a request that failed
# Of the server itself: too many requests, or an error that may pass.
PASSING = frozenset({408, 429, 500, 502, 503, 504})


class ServerJudge(SegmentJudge):
    """Ask a model on a server that offers ``/chat/completions``.

    A request that fails is sent once more. If it fails again, the run stops with an error.

    Args:
        url: Address before /chat/completions, such as http://127.0.0.1:8000/v1.
        model: Name of the model on the server.
        api_key_env: Environment variable that holds the server's key. Without it, no key is sent.
        timeout_s: Seconds to wait for a reply.
        num_parallel: Number of requests at the same time.
        max_reply_tokens: Maximum length of a reply in tokens, including its thought if the model thinks.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 120.0,
        num_parallel: int = 8,
        max_reply_tokens: int = 1024,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{FLAG}.url {url}: give an address such as http://127.0.0.1:8000/v1")
        for flag, value in (("num_parallel", num_parallel), ("max_reply_tokens", max_reply_tokens)):
            if value < 1:
                raise ValueError(f"{FLAG}.{flag} {value}: must be at least 1")
        if not timeout_s > 0:
            raise ValueError(f"{FLAG}.timeout_s {timeout_s}: must be above 0")
        self.url = url.rstrip("/")
        self.model = model
        self.api_key_env = api_key_env
        self.timeout_s = timeout_s
        self.num_parallel = num_parallel
        self.max_reply_tokens = max_reply_tokens

    @property
    def name(self) -> str:
        return f"ServerJudge ({self.model} at {self.url})"

    def replies(self, prompts: Sequence[str], *, attempt: int) -> list[str]:
        temperature = float(attempt > 0)
        with ThreadPoolExecutor(self.num_parallel) as pool:
            return list(pool.map(lambda prompt: self._reply(prompt, temperature), prompts))

    def _reply(self, prompt: str, temperature: float) -> str:
        try:
            try:
                return self._request(prompt, temperature)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code not in PASSING:
                    raise
                time.sleep(RETRY_S)
                return self._request(prompt, temperature)
        except urllib.error.HTTPError as error:
            said = error.read(200).decode(errors="replace").strip() or error.reason
            raise ValueError(
                f"{FLAG}.url {self.url}: {self._refusal(error.code)} ({error.code}: {said})"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise ValueError(
                f"{FLAG}.url {self.url}: the judge does not answer ({reason}). Is the server running, and is "
                f"timeout_s {self.timeout_s:g} long enough? Start it, correct the address, or choose another "
                "reward"
            ) from error

    def _request(self, prompt: str, temperature: float) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": self.max_reply_tokens,
        }
        key = os.environ.get(self.api_key_env, "").strip()
        request = urllib.request.Request(
            f"{self.url}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
        )
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            content = response.read()
        try:
            answer: Any = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{FLAG}.url {self.url}: what answers there is not in the form of OpenAI's chat completions "
                f"(it begins with {content[:80]!r}); give the address before /chat/completions"
            ) from error
        return answer if isinstance(answer, str) else ""  # a model that ran out of tokens while it thought

    def _refusal(self, code: int) -> str:
        if code in (401, 403):
            return f"the judge refuses our key; set the environment variable {self.api_key_env} (api_key_env)"
        if code == 404:
            return f"there is no model {self.model!r} or no /chat/completions; correct url or model"
        return "the judge refuses the request"
