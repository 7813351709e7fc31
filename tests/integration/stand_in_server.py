"""A server process that speaks the part of vLLM's protocol that VLLMServerEngine uses.

It starts in a second where vLLM takes half a minute, so the default suite can test faults of real processes.
Tests marked `vllm` use the real server in its place. Its completions are a pure function of the seed, the
prompt and the weights that it holds, so a test knows each of them in advance. It shares no code with the
package, and computes the checksum in a second way.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from aiohttp import web
from safetensors.numpy import load_file, save

FIRST_LABEL = "default"  # the same as vLLM's


def array_checksum(array: np.ndarray) -> str:
    return hashlib.sha256(
        f"(torch.{array.dtype}, {array.shape})".encode() + (array + np.float32(0)).tobytes()
    ).hexdigest()


def published(folder: Path, state: str, weights: dict[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    """Return state and weights of a published folder, given those that are held."""
    manifest = json.loads((folder / "manifest.json").read_text())
    base = manifest["base"]
    if manifest["state"] == state:
        return state, weights
    if manifest["full_files"] is not None and (base is None or base["state"] != state):
        files = [load(folder / name) for name in manifest["full_files"]]
        weights = {name: array for file in files for name, array in file.items()}
    else:
        assert base is not None, f"{folder}: no base"
        _, weights = published(folder.with_name(base["folder"]), state, weights)
        weights = {name: array.copy() for name, array in weights.items()}
        files = [load(folder / name) for name in manifest["patch_files"]]
        for name, gaps in [item for file in files for item in file.items() if item[0].startswith("gaps:")]:
            name, place, places = name.removeprefix("gaps:"), -1, []
            for byte in gaps.tolist():
                place += byte
                if byte < 255:
                    place += 1
                    places.append(place)
            (values,) = [file[f"values:{name}"] for file in files if f"values:{name}" in file]
            weights[name].reshape(-1, manifest["blocks"][name])[places] = values
    digests = {name: digest(array) for name, array in weights.items()}
    for name, wanted in manifest["digests"].items():
        assert digests.get(name) == wanted, f"{folder}: {name} has another checksum"
    whole = xxhash.xxh3_128_hexdigest(
        json.dumps([[name, digests[name]] for name in sorted(digests)]).encode()
    )
    assert whole == manifest["state"], f"{folder}: incomplete"
    return whole, weights


def load(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except Exception as error:
        raise AssertionError(f"{file}: {error}") from error


def digest(array: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(f"(torch.{array.dtype}, {array.shape})".encode() + array.tobytes())


def say(checksums: dict[str, str], prompt_ids: list[int], seed: int, max_tokens: int) -> list[int]:
    """Compute the completion."""
    key = hashlib.sha256(json.dumps([sorted(checksums.items()), list(prompt_ids), seed]).encode()).digest()
    return [
        int.from_bytes(hashlib.sha256(key + bytes([turn])).digest()[:4], "big") % 500 + 10
        for turn in range(max_tokens)
    ]


class StandIn:
    def __init__(self, facts: dict[str, Any], delay_s: float) -> None:
        self.facts = facts
        self.delay_s = delay_s
        self.label = FIRST_LABEL
        self.is_paused = False
        self.weights: dict[str, np.ndarray] = {}
        self.held: tuple[str, dict[str, np.ndarray]] = ("", {})  # state, and the copy to which patches apply
        self.loader: str | None = None
        self.num_loads = 0
        self.running: set[asyncio.Task[Any]] = set()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/weight_info", self.weight_info),
            web.post("/update_weight_version", self.update_weight_version),
            web.post("/pause", self.pause),
            web.post("/resume", self.resume),
            web.post("/reset_prefix_cache", self.reset_prefix_cache),
            web.post("/weight_checker", self.zero_weights),
            web.post("/collective_rpc", self.collective_rpc),
            web.post("/inference/v1/generate", self.generate),
        ]

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def weight_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label})

    async def update_weight_version(self, request: web.Request) -> web.Response:
        self.label = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def pause(self, _: web.Request) -> web.Response:
        self.is_paused = True
        for task in self.running:
            task.cancel()
        return web.json_response({"status": "paused"})

    async def resume(self, _: web.Request) -> web.Response:
        self.is_paused = False
        return web.json_response({"status": "resumed"})

    async def reset_prefix_cache(self, _: web.Request) -> web.Response:
        return web.json_response({"success": not self.running})

    async def zero_weights(self, _: web.Request) -> web.Response:
        self.weights = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        return web.json_response({"status": "reset"})

    async def collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        try:
            result = getattr(self, body["method"])(**body.get("kwargs", {}))
            # vLLM does the same.
            return web.json_response(
                {"results": [result if result is None or isinstance(result, dict | list) else str(result)]}
            )
        except Exception as error:
            return web.json_response({"error": str(error)}, status=500)

    def rpt_describe(self) -> dict[str, Any]:
        return self.facts | {"num_loads": self.num_loads}

    def rpt_may_load(self, label: str, for_s: float) -> dict[str, bool]:
        is_first, self.loader = self.loader != label, label
        return {"may_load": is_first}

    def rpt_loaded(self) -> None:
        self.loader = None

    def rpt_load_folder(self, folder: str) -> dict[str, Any]:
        self.num_loads += 1
        try:
            self.held = published(Path(folder), *self.held)
        except KeyError as error:
            self.held = ("", {})
            return {"damage": f"a patch is wrong: {error}"}
        except AssertionError as error:
            self.held = ("", {})
            return {"damage": str(error)}
        self.weights = dict(self.held[1])
        return {"damage": None}

    def rpt_checksums(self, names: list[str]) -> dict[str, str]:
        return {name: array_checksum(self._weight(name)) for name in names}

    def rpt_read(self, names: list[str]) -> dict[str, str]:
        return {"safetensors": base64.b64encode(save({name: self._weight(name) for name in names})).decode()}

    def _weight(self, name: str) -> np.ndarray:
        whole, _, part = name.partition("[:, ")
        first, _, end = part.removesuffix("]").partition(":")
        return self.weights[whole][:, int(first) : int(end)].copy() if part else self.weights[whole]

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        while self.is_paused:
            await asyncio.sleep(0.01)
        task = asyncio.ensure_future(self._complete(body["token_ids"], body["sampling_params"]))
        self.running.add(task)
        try:
            choices = await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise  # the client went away
            choices = [
                {"index": index, "finish_reason": "abort"} for index in range(body["sampling_params"]["n"])
            ]
        finally:
            task.cancel()
            self.running.discard(task)
        return web.json_response({"choices": choices})

    async def _complete(self, prompt_ids: list[int], sampling: dict[str, Any]) -> list[dict[str, Any]]:
        num_before, label = sampling["max_tokens"] // 2, self.label
        await asyncio.sleep(self.delay_s * sampling["max_tokens"])
        spans = [
            {"version": label, "start": 0, "end": num_before},
            {"version": self.label, "start": num_before, "end": sampling["max_tokens"]},
        ]
        checksums = self.rpt_checksums(list(self.weights))
        rows = [
            say(checksums, prompt_ids, sampling["seed"] + index, sampling["max_tokens"])
            for index in range(sampling["n"])
        ]
        return [
            {
                "index": index,
                "finish_reason": "length",
                "token_ids": row,
                "weight_versions": spans,
                "logprobs": {"content": [{"token_id": token_id, "logprob": -0.5} for token_id in row]},
            }
            for index, row in enumerate(rows)
        ]


@web.middleware
async def require_key(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    if (
        request.path != "/health"
        and request.headers.get("Authorization") != f"Bearer {os.environ['RPT_SERVER_KEY']}"
    ):
        return web.json_response({"error": "no key"}, status=401)
    return await handler(request)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--facts", type=json.loads, required=True)
    parser.add_argument("--delay-s", type=float, default=0.005, help="Time for each token of a completion.")
    args = parser.parse_args()
    app = web.Application(middlewares=[require_key])
    app.add_routes(StandIn(args.facts, args.delay_s).routes())
    web.run_app(app, host="127.0.0.1", port=args.port, print=None)
