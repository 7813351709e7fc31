"""Real server processes on loopback, which tests kill, stop and start again."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from transformers import AutoConfig

from processes import Guarded, free_port
from rpt_lightning.rollout.servers.agreement import PROTOCOL, architecture
from rpt_lightning.rollout.servers.processes import server_command

KEY = "a key that only tests use"
MAX_MODEL_LEN = 256
HAS_VLLM = sys.platform == "linux" and importlib.util.find_spec("vllm") is not None
MAX_START_CPU_S = 300.0  # vLLM takes about 30
MAX_IDLE_S = 120.0


class ServerUnderTest:
    def __init__(self, kind: str, model: Path, log_folder: Path, *, max_num_seqs: int = 8) -> None:
        self.kind = kind
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = (
            self._stand_in(model)
            if kind == "stand-in"
            else self._vllm(model, 2 if kind == "vllm-split" else 1, max_num_seqs)
        )
        self._log = log_folder / f"server-{self.port}.log"
        self._process: Guarded | None = None

    def _stand_in(self, model: Path) -> tuple[str, ...]:
        script = Path(__file__).with_name("stand_in_server.py")
        facts = {
            "protocol": PROTOCOL,
            "dtype": "float32",
            "max_model_len": MAX_MODEL_LEN,
            "logprobs_mode": "processed_logprobs",
            "prefix_block_size": 16,
        }
        facts["architecture"] = architecture(AutoConfig.from_pretrained(model))
        return (sys.executable, str(script), "--port", str(self.port), "--facts", json.dumps(facts))

    def _vllm(self, model: Path, num_devices: int, max_num_seqs: int) -> tuple[str, ...]:
        return server_command(
            model_path=str(model), url=self.url, host="127.0.0.1", dtype="float32",
            max_model_len=MAX_MODEL_LEN, seed=0, tensor_parallel_size=num_devices, max_num_seqs=max_num_seqs,
            gpu_memory_utilization=None, kv_cache_gib=0.25, enforce_eager=True, block_size=32,
            weight_transfer=None,
        )  # fmt: skip

    def start(self) -> None:
        env = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "RPT_SERVER_KEY": KEY,
            "OMP_NUM_THREADS": "1",
            "PYTHONSAFEPATH": "1",
        }
        with self._log.open("ab") as output:
            self._process = Guarded(
                self._command, env=os.environ | env, stdout=output, stderr=subprocess.STDOUT
            )

    def wait_until_ready(self) -> None:
        """Wait for an answer. The limits are on computing and idle time, not on wall-clock time.

        Beside other work on the same cores, a start takes ten times as long.
        """
        assert self._process is not None
        computed_s, at_s = 0.0, time.monotonic()
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            words = f"{self.url} did not come up: {self._log.read_text()[-3000:]}"
            assert self._process.is_running, words
            if (now_s := self._process.cpu_s()) > computed_s:
                computed_s, at_s = now_s, time.monotonic()
            assert computed_s < MAX_START_CPU_S, words
            assert time.monotonic() - at_s < MAX_IDLE_S, words
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        """Signal the whole server. vLLM's front end, engine and worker are separate processes."""
        assert self._process is not None
        self._process.signal(number)

    def resume(self) -> None:
        """Wake a server that a failed test left stopped."""
        if self.is_running:
            self.signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.is_running


class ForeignProgram:
    """Another program on a server's port. It answers each request with the same JSON and a given status."""

    SCRIPT = """
import http.server, sys

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, _, reason = sys.argv[2].partition(" ")
        self.send_response(int(status), reason)
        self.end_headers()
        self.wfile.write(b'["hello"]')

    do_POST = do_GET

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""

    def __init__(self, port: int, answer: str) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-c", self.SCRIPT, str(port), answer]

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        end = time.monotonic() + MAX_IDLE_S
        while True:
            try:
                urllib.request.urlopen(self._url, timeout=5).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.05)

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
