"""Servers that two ranks generate on at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server_processes_for_tests import KEY, ServerUnderTest
from stand_in_server import say
from two_rank_servers import change

from processes import free_port
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.weight_sync.checksum import checksum


@pytest.fixture
def two_ranks(
    servers: list[ServerUnderTest], tiny_model_dir: Path, tmp_path: Path
) -> Iterator[Callable[[int], list[subprocess.Popen[str]]]]:
    """Return ``two_ranks(max_tokens)``, which starts them."""
    if servers[0].kind != "stand-in":
        pytest.skip("this does not depend on the kind of server")
    ranks: list[subprocess.Popen[str]] = []

    def start(max_tokens: int) -> list[subprocess.Popen[str]]:
        script, port = Path(__file__).with_name("two_rank_servers.py"), free_port()
        command = [
            sys.executable,
            str(script),
            str(tiny_model_dir),
            str(tmp_path / "weights"),
            str(max_tokens),
            *[server.url for server in servers],
        ]
        group = {
            "RPT_SERVER_KEY": KEY,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        ranks.extend(
            subprocess.Popen(
                command, env=os.environ | group | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
            )
            for rank in range(2)
        )
        return ranks

    yield start
    for rank in ranks:
        rank.kill()
        rank.wait()


def said(ranks: list[subprocess.Popen[str]]) -> list[dict]:
    outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.long
def test_two_ranks_bring_back_servers_that_all_died(
    two_ranks, tiny_model_dir: Path, servers: list[ServerUnderTest]
) -> None:
    """All servers die during a generation, when only ranks that did not publish the weights can help.

    One of them loads the weights, once.
    """
    ranks = two_ranks(240)
    for rank in ranks:
        while rank.stdout.readline() != "generating version 2\n":
            assert rank.poll() is None
    for server in servers:
        server.kill()
    for server in servers:
        server.start()
    for server in servers:
        server.wait_until_ready()
    found = said(ranks)
    checksums = {name: checksum(weight) for name, weight in named_weights(after_two_steps(tiny_model_dir))}
    for rank in range(2):
        assert found[rank]["completions"] == [
            [say(checksums, [rank, i], 100 * rank + i + index, 240) for index in range(2)] for i in range(4)
        ]
    assert all(num_loads(server) <= 1 for server in servers)
    assert sum(num_loads(server) for server in servers) >= 1


def num_loads(server: ServerUnderTest) -> int:
    """Return how often weights were loaded into a stand-in since its start."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        server.url + "/collective_rpc", data=b'{"method": "rpt_describe"}', headers=headers
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["results"][0]["num_loads"]


def after_two_steps(model: Path) -> Policy:
    policy = Policy(str(model))
    policy.materialize()
    change(policy)
    change(policy)
    return policy


@pytest.mark.long
def test_two_ranks_share_the_servers(two_ranks, tiny_model_dir: Path) -> None:
    first, second = said(two_ranks(8))
    checksums = {name: checksum(weight) for name, weight in named_weights(after_two_steps(tiny_model_dir))}
    for rank, found in enumerate((first, second)):
        assert found["completions"] == [
            [say(checksums, [rank, i], 100 * rank + i + index, 8) for index in range(2)] for i in range(4)
        ]
    assert (first["version"], first["label"]) == (second["version"], second["label"]) == (2, first["label"])
    # Version 2 was sent as what changed, one entry in 97, by the first rank alone.
    assert 1 / 97 < first["sent"]["changed_frac"] < 1 / 90
    assert first["sent"]["num_bytes"] > 0
    assert first["sent"]["num_full_bytes"] == 0
    assert second["sent"] == {"num_bytes": 0, "num_full_bytes": 0, "changed_frac": 0.0}
    # A failure on the first rank while weights are gathered is an error on both ranks.
    assert first["error"].startswith("FileNotFoundError")
    assert second["error"].startswith("RuntimeError: rank 0: FileNotFoundError")
    assert first["version after the error"] is second["version after the error"] is None
