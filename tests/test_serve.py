"""`rpt serve`: what it starts and refuses, and (long) real vLLM servers that it starts, restarts and ends."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from processes import Guarded, free_port
from rpt_lightning import cli
from rpt_lightning.cli.serve import ServeSettings, _log_name
from rpt_lightning.rollout.servers.access import find_key, make_key
from rpt_lightning.rollout.servers.key import RequireKey
from rpt_lightning.rollout.servers.processes import Servers, ServerSpec, is_loopback

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SECRET = "5ecret-of-this-test"


@pytest.fixture
def flags(tiny_model_dir: Path, tmp_path: Path) -> list[str]:
    return [
        *("--config", str(CONFIGS / "debug.yaml"), "--config", str(CONFIGS / "rollout" / "servers.yaml")),
        *("--model.policy.path", str(tiny_model_dir), "--rollout.engine.dtype", "float32"),
        *(
            "--trainer.default_root_dir",
            str(tmp_path / "run"),
            "--rollout.engine.api_key_file",
            str(tmp_path / "server.key"),
        ),
    ]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Servers]:
    """The servers that would be started, without starting them."""
    found: list[Servers] = []
    monkeypatch.setattr(Servers, "run", lambda servers, *, ready_timeout_s: found.append(servers))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    return found


def test_servers_are_started_as_the_run_will_ask_for_them(
    flags, started, tiny_model_dir: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("RPT_SERVER_KEY", SECRET)
    assert cli.main(["serve", *flags, "--seed_everything", "7", "--serve.max_num_seqs", "16"]) == 0
    (servers,) = started
    assert [spec.url for spec in servers.specs] == ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
    command = servers.specs[1].command
    assert any(part.endswith(str(tiny_model_dir)) for part in command)
    for flag in [
        "--host=127.0.0.1",
        "--port=8001",
        "--dtype=float32",
        "--max-model-len=240",  # 160 + 16, and 64 for the thought controls
        "--max-num-seqs=16",
        "--seed=7",
        "--load-format=dummy",
        "--logprobs-mode=processed_logprobs",
        "--middleware=rpt_lightning.rollout.servers.key.RequireKey",
        "--tokens-only",
    ]:
        assert flag in command
    assert servers.specs[1].log_file == tmp_path / "run" / "servers" / "server-8001.log"
    # The key reaches the server through its environment only.
    environment = servers._environment(servers.specs[0])
    assert (environment["RPT_SERVER_KEY"], environment["VLLM_SERVER_DEV_MODE"]) == (SECRET, "1")
    monkeypatch.setenv("VLLM_API_KEY", "another key, before some of the paths")
    assert "VLLM_API_KEY" not in servers._environment(servers.specs[0])
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err + repr([spec.command for spec in servers.specs])


def test_a_missing_key_is_made_once_and_only_its_owner_can_read_it(
    flags, started, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.delenv("RPT_SERVER_KEY", raising=False)
    assert cli.main(["serve", *flags]) == 0
    file = tmp_path / "server.key"
    key = file.read_text().strip()
    assert (len(key), file.stat().st_mode & 0o777) == (64, 0o600)
    assert key not in "".join(capsys.readouterr())
    assert cli.main(["serve", *flags]) == 0
    assert [servers._key for servers in started] == [key, key] == [find_key("RPT_SERVER_KEY", str(file))] * 2
    file.chmod(0o644)
    assert cli.main(["serve", *flags]) == 1
    assert "may be read by others (mode 644): chmod 600 it" in capsys.readouterr().err
    with pytest.raises(FileExistsError):
        make_key(str(file))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--rollout.engine.api_key_file", "null"],
            "there is no key. Set the environment variable RPT_SERVER_KEY",
        ),
        (["--rollout.engine.api_key_file", "null", "--serve.host", "0.0.0.0"], "there is no key"),
        (["--serve.urls", "[http://127.0.0.1:9]"], "none of rollout.engine.urls="),
        (["--rollout.engine.urls", "[http://10.1.2.3:8000]"], r"none of rollout.engine.urls="),
        (
            ["--rollout.engine.urls", "[http://10.1.2.3:8000]", "--serve.urls", "[http://10.1.2.3:8000]"],
            "nobody could reach http://10.1.2.3:8000",
        ),
        (["--rollout.engine.urls", "[http://127.0.0.1]"], "names no port"),
        (["--rollout.engine", "HFEngine"], "rollout.engine is not VLLMServerEngine"),
    ],
)
def test_what_is_refused(flags, started, more, message, monkeypatch, capsys) -> None:
    monkeypatch.delenv("RPT_SERVER_KEY", raising=False)
    assert cli.main(["serve", *flags, *more]) == 1
    assert message in capsys.readouterr().err
    assert started == []


def test_nodes_that_share_a_folder_have_logs_of_their_own() -> None:
    logs = {
        "http://127.0.0.1:8000": "server-8000.log",
        "http://localhost:8000": "server-8000.log",
        "http://10.1.2.3:8000": "server-10.1.2.3-8000.log",
        "http://[fd00::1]:8000": "server-fd00__1-8000.log",
        "http://node-a:8000": "server-node-a-8000.log",
    }
    assert {url: _log_name(url) for url in logs} == logs


def test_which_addresses_only_this_machine_reaches() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.9.1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.5", "no-such-host.invalid")] == [
        False
    ] * 4


@pytest.mark.parametrize(
    ("scope", "is_let_through"),
    [
        ({"type": "http", "method": "GET", "path": "/health", "headers": []}, True),
        ({"type": "lifespan"}, True),
        (
            {
                "type": "http",
                "method": "POST",
                "path": "/collective_rpc",
                "headers": [(b"authorization", f"Bearer {SECRET}".encode())],
            },
            True,
        ),
        ({"type": "http", "method": "POST", "path": "/collective_rpc", "headers": []}, False),
        ({"type": "http", "method": "POST", "path": "/health", "headers": []}, False),
        ({"type": "http", "method": "OPTIONS", "path": "/collective_rpc", "headers": []}, False),
        (
            {
                "type": "http",
                "method": "POST",
                "path": "/collective_rpc",
                "headers": [(b"authorization", b"Bearer x")],
            },
            False,
        ),
        (
            {
                "type": "http",
                "method": "POST",
                "path": "/collective_rpc",
                "headers": [(b"authorization", SECRET.encode())],
            },
            False,
        ),
        ({"type": "websocket", "path": "/v1/realtime", "headers": []}, False),
    ],
)
def test_the_guard(scope, is_let_through, monkeypatch) -> None:
    import asyncio

    reached, sent = [], []

    async def app(scope, receive, send) -> None:
        reached.append(scope)

    async def send(message) -> None:
        sent.append(message)

    monkeypatch.setenv("RPT_SERVER_KEY", SECRET)
    asyncio.run(RequireKey(app)(scope, None, send))
    assert (reached, sent == []) == ([scope] if is_let_through else [], is_let_through)
    monkeypatch.setenv("RPT_SERVER_KEY", "")
    with pytest.raises(ValueError, match="RPT_SERVER_KEY holds no key"):
        RequireKey(app)


def spec(tmp_path: Path, script: str, *, url: str = "http://127.0.0.1:1") -> ServerSpec:
    return ServerSpec(
        url=url, command=(sys.executable, "-c", script), devices=None, log_file=tmp_path / "server.log"
    )


def test_a_server_that_does_not_come_up_is_shown_by_its_last_words(tmp_path: Path) -> None:
    servers = Servers(
        [spec(tmp_path, "raise SystemExit('no room on this device')")], key=SECRET, restart=True, hung_s=900.0
    )
    with pytest.raises(RuntimeError, match=r"(?s)ended while it started.*no room on this device"):
        servers.run(ready_timeout_s=60)
    slow = spec(tmp_path, "import time; time.sleep(600)")
    servers = Servers([slow], key=SECRET, restart=True, hung_s=900.0)
    with pytest.raises(RuntimeError, match=r"did not answer within 0\.2 s"):
        servers.run(ready_timeout_s=0.2)
    assert all(process.poll() is not None for process in servers._processes.values())


def test_a_port_on_which_another_process_answers_is_refused(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    other = Guarded(
        [sys.executable, "-c", ANSWERS.format(port=url.rpartition(":")[2])], stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: is_up(url))
        servers = Servers(
            [spec(tmp_path, "import time; time.sleep(600)", url=url)], key=SECRET, restart=True, hung_s=900.0
        )
        with pytest.raises(ValueError, match=f"another process answers at {url}"):
            servers.run(ready_timeout_s=60)
    finally:
        other.kill()
    assert servers._processes == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("hung_s", 0.0), ("tensor_parallel_size", 0), ("gpu_memory_utilization", 1.5), ("kv_cache_gib", -1.0)],
)
def test_settings_that_cannot_be_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--serve.{name} {value} must be"):
        ServeSettings(**{name: value})


ANSWERS = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        print(self.path, os.getpid(), flush=True)
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


def test_a_server_that_hangs_is_started_again(tmp_path: Path, capfd) -> None:
    port = free_port()
    servers = Servers(
        [spec(tmp_path, ANSWERS.format(port=port), url=f"http://127.0.0.1:{port}")],
        key=SECRET,
        restart=True,
        hung_s=4.0,
    )

    def watched() -> list[int]:
        """Processes that were checked for hanging, one for each start."""
        log = tmp_path / "server.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return list(dict.fromkeys(int(line.split()[1]) for line in lines if line.startswith("/weight_info")))

    def hang_the_first_and_end_the_second() -> None:
        wait_for(watched)
        os.kill(watched()[0], signal.SIGSTOP)
        wait_for(lambda: len(watched()) == 2)
        os.kill(os.getpid(), signal.SIGTERM)  # as `rpt serve` is ended

    thread = threading.Thread(target=hang_the_first_and_end_the_second)
    thread.start()
    servers.run(ready_timeout_s=60)
    thread.join()
    assert len(watched()) == 2
    assert "has not answered for 4 s (--serve.hung_s): it is ended" in capfd.readouterr().err


def call(url: str, path: str, *, key: str | None = None, body: object = None) -> int:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(
        url + path, data=None if body is None else json.dumps(body).encode(), headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def wait_for(condition, seconds: float = 900) -> None:
    """The limit is for a busy machine. On an idle one a vLLM server is up in half a minute."""
    for _ in range(int(seconds / 0.2)):
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError("did not happen")


def is_up(url: str) -> bool:
    try:
        return call(url, "/health") == 200
    except OSError:
        return False


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)
def test_a_real_server_from_start_to_end(flags, tiny_task_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if name != "RPT_SERVER_KEY"} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [
        sys.executable,
        "-m",
        "rpt_lightning.cli",
        "serve",
        *flags,
        "--rollout.engine.urls",
        f"[{url}]",
        "--serve.kv_cache_gib",
        "0.25",
    ]
    output = tmp_path / "serve.log"
    with output.open("w") as file:
        serve = Guarded(
            [*command, "--serve.max_num_seqs", "8"], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    try:
        wait_for(lambda: "1 servers are ready" in output.read_text() or not serve.is_running)
        assert serve.is_running, output.read_text()
        key = (tmp_path / "server.key").read_text().strip()
        # Every way to the weights needs the key. vLLM's own guard leaves those outside /v1 and /inference
        # open.
        for path in (
            "/collective_rpc",
            "/update_weights",
            "/inference/v1/generate",
            "/v1/completions",
            "/update_weight_version",
            "/pause",
        ):
            assert [call(url, path, body={}), call(url, path, body={}, key="wrong")] == [401, 401], path
        assert [call(url, "/weight_info"), call(url, "/metrics"), call(url, "/weight_info", key=key)] == [
            401,
            401,
            200,
        ]
        assert call(url, "/collective_rpc", body={"method": "rpt_describe"}, key=key) == 200
        # The key is in no command line and no log.
        family = subprocess.run(
            ["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
        ).stdout
        assert "rpt_lightning.rollout.servers.key" in family
        assert key not in family
        # A whole run on it: every update is verified by version, tensors and log-probs.
        fit = [
            sys.executable,
            "-m",
            "rpt_lightning.cli",
            "fit",
            *flags,
            "--rollout.engine.urls",
            f"[{url}]",
            "--trainer.max_steps",
            "2",
        ]
        fit += [
            "--data.task_dir",
            str(tiny_task_dir),
            "--rollout.engine.transport.folder",
            str(tmp_path / "weights"),
        ]
        done = subprocess.run(fit, capture_output=True, text=True, env=environment, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
        assert max(step["sync/logprob_diff_max"] for step in steps if "sync/logprob_diff_max" in step) < 1e-3
        assert key not in done.stdout + done.stderr + (tmp_path / "run" / "config.yaml").read_text()
        assert list((tmp_path / "weights").iterdir()) == []
        # A server that dies comes back, and its engine does not outlive it.
        (front,) = [int(line.split()[0]) for line in family.splitlines() if line.split()[1] == str(serve.pid)]
        os.kill(front, signal.SIGKILL)
        wait_for(lambda: "ended with status -9" in output.read_text())
        wait_for(lambda: is_up(url))
        assert call(url, "/weight_info", key=key) == 200
        serve.process.terminate()
        assert serve.process.wait(120) == 0
        assert not is_up(url)
        left = subprocess.run(
            ["ps", "-ww", "-eo", "pid,stat,args"], capture_output=True, text=True, check=True
        ).stdout
        assert str(port) not in left
        assert (
            key not in output.read_text() + (tmp_path / "run" / "servers" / f"server-{port}.log").read_text()
        )
    finally:
        serve.kill()
