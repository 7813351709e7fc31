"""All servers of a real `rpt fit` process die for good, and the run is resumed when they are back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from async_run import lines_of
from real_runs import RealRun, differences, scripted_flags, traces
from server_processes_for_tests import KEY, ServerUnderTest

STEPS = 12


def flags_for(servers: list[ServerUnderTest], model: Path, tasks: Path, folder: Path) -> list[object]:
    """The run waits two seconds for a server. It saves only at its end."""
    (_, path) = scripted_flags(model, tasks, steps=STEPS)
    config = yaml.safe_load(path.read_text())
    transport = {"class_path": "SharedFolderTransport", "init_args": {"folder": str(folder / "weights")}}
    settings = {
        "urls": [server.url for server in servers],
        "dtype": "float32",
        "timeout_s": 10.0,
        "max_wait_s": 2.0,
        "transport": transport,
    }
    config["rollout"]["engine"] = {"class_path": "VLLMServerEngine", "init_args": settings}
    config["rollout"]["check"] = {"verify_sequences": 0}  # a stand-in invents its log-probs
    config["trainer"]["limit_val_batches"] = 0
    config["checkpoint"] = {"every_n_steps": 1000}
    path = folder / "servers.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", path]


def start(run: RealRun, devices: int) -> Callable[[], int]:
    """Start the run and return a function that waits for its exit status.

    Lightning starts further ranks only for a command.
    """
    if devices == 1:
        run.start(RPT_SERVER_KEY=KEY)
        return run.status
    process = run.start_command()
    return lambda: process.wait(240)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.long)])
def test_all_servers_gone_for_good(
    servers: list[ServerUnderTest],
    tiny_model_dir: Path,
    tiny_task_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices: int,
) -> None:
    if servers[0].kind != "stand-in":
        pytest.skip("the run is compared bit for bit, and rounding in real servers depends on their batches")
    monkeypatch.setenv("RPT_SERVER_KEY", KEY)
    flags = [*flags_for(servers, tiny_model_dir, tiny_task_dir, tmp_path), "--trainer.devices", devices]
    whole = RealRun(tmp_path / "whole", flags)
    assert start(whole, devices)() == 0, whole.text()

    run = RealRun(tmp_path / "parts", flags)
    status, limit = start(run, devices), time.monotonic() + 120
    while run.step() < 2:
        assert time.monotonic() < limit, run.text()
        time.sleep(0.01)
    for server in servers:
        server.kill()
    assert status() not in (0, 75), run.text()
    for rank in range(devices):  # the terminal shows it on one line
        assert "EngineLost: none of the" in (run.folder / f"error-{rank}.txt").read_text()
    done = run.step()
    assert 2 <= done < STEPS
    assert "none of the 2 servers could be used" in run.text()
    assert f"step-{done:06d}.ckpt: continue with --ckpt_path last" in run.text()
    assert run.checkpoints() == [f"step-{done:06d}.ckpt"]

    for server in servers:
        server.start()
    for server in servers:
        server.wait_until_ready()
    assert start(run, devices)() == 0, run.text()
    found, expected = traces(run.folder), traces(whole.folder)
    assert differences(found, expected) == []
    assert all((row["run/usable_servers"], row["run/lost_servers"]) == (2, 0) for row in lines_of(run.folder))
    # There was something to lose.
    assert sum(row["optim/grad_norm"] > 0 for row in found["steps"]) > STEPS // 2
