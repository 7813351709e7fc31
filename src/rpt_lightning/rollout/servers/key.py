"""A guard for vLLM servers (``--middleware``), which requires the key for every request except GET /health.

vLLM's own ``--api-key`` covers only the paths under /v1, /v2, /inference and /cohere (0.32, authenticate.py).
It would leave /collective_rpc open, which can change the weights.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

KEY_VARIABLE = "RPT_SERVER_KEY"
_Scope = dict[str, Any]
_App = Callable[[_Scope, Any, Any], Awaitable[None]]


class RequireKey:
    """ASGI middleware that checks the key.

    The key comes from the environment, since every user of the machine can see a command line.
    """

    def __init__(self, app: _App) -> None:
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:  # fail closed: a server without its key must not start
            raise ValueError(
                f"environment variable {KEY_VARIABLE} holds no key; start servers with `rpt serve`"
            )
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        is_open = scope["type"] == "lifespan" or (
            scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/health"
        )
        if is_open or any(
            name == b"authorization" and hmac.compare_digest(value, self._expected)
            for name, value in scope["headers"]
        ):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send(
                {
                    "type": "http.response.start",
                    "status": 401,
                    "headers": [(b"content-type", b"application/json")],
                }
            )
            await send(
                {
                    "type": "http.response.body",
                    "body": b'{"error": "this server needs its key: Authorization: Bearer ..."}',
                }
            )
        else:
            await send({"type": "websocket.close", "code": 1008})
