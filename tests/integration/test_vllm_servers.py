"""Rollouts by servers, and the faults of servers: processes that are killed, hang, come back empty or hold the wrong weights.

Each test runs twice: against stand-in servers (real processes, known completions) and, marked `long`, against the real vLLM.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from server_processes_for_tests import KEY, MAX_MODEL_LEN, ServerUnderTest
from stand_in_server import say

from processes import free_port
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing import pack
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.checksum import checksum
from rpt_lightning.rollout.engine import GenerationInterrupted
from rpt_lightning.rollout.vllm_server_engine import NoServerError, VLLMServerEngine
from rpt_lightning.rollout.weight_transport import SharedFolderTransport
from rpt_lightning.training.sync_check import SyncError, check_weights
from rpt_lightning.types import Completion, GenerationRequest, SamplingSettings, TrainSequence

TEMPERATURE = 0.8
SAMPLING = SamplingSettings(temperature=TEMPERATURE, max_tokens=24, stop_token_ids=(1,))
REQUESTS = [
    GenerationRequest(task_id=f"doc-{i // 2}:{i}", prompt_ids=tuple(range(40 + i, 60 + 3 * i)), n=4, seed=100 * i, sampling=SAMPLING)
    for i in range(6)
]
# Long enough that a fault comes in the middle.
LONG_REQUESTS = [replace(request, sampling=replace(SAMPLING, max_tokens=160, stop_token_ids=())) for request in REQUESTS]
HAS_VLLM = sys.platform == "linux" and importlib.util.find_spec("vllm") is not None
REAL = [pytest.mark.long, pytest.mark.vllm, pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed here")]


@pytest.fixture(scope="module", params=["stand-in", pytest.param("vllm", marks=REAL)])
def all_servers(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerUnderTest]]:
    servers = [ServerUnderTest(request.param, tiny_model_dir, tmp_path_factory.mktemp("logs")) for _ in range(2)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def servers(all_servers: list[ServerUnderTest]) -> list[ServerUnderTest]:
    """Both up; a test may break them."""
    for server in all_servers:
        server.resume()
    dead = [server for server in all_servers if not server.is_running]
    for server in dead:
        server.start()
    for server in dead:
        server.wait_until_ready()
    return all_servers


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    policy = Policy(str(tiny_model_dir))
    policy.materialize()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(3.0)  # away from the uniform distribution
    return policy


@pytest.fixture
def make_engine(
    servers: list[ServerUnderTest], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., VLLMServerEngine]]:
    monkeypatch.setenv("RPT_SERVER_KEY", KEY)
    engines: list[VLLMServerEngine] = []

    def make(*, start: bool = True, **changes) -> VLLMServerEngine:
        settings = {"urls": [server.url for server in servers], "dtype": "float32", "timeout_s": 20.0, "max_wait_s": 300.0} | changes
        engine = VLLMServerEngine(transport=SharedFolderTransport(str(tmp_path / "weights"), shard_gib=0.001), **settings)
        engines.append(engine)
        if start:
            engine.start(str(tiny_model_dir), seed=0, max_model_len=MAX_MODEL_LEN)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make_engine: Callable[..., VLLMServerEngine], policy: Policy) -> VLLMServerEngine:
    engine = make_engine()
    engine.update_weights(named_weights(policy), version=3)
    return engine


def call(server: ServerUnderTest, path: str, body: object) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(server.url + path, data=json.dumps(body).encode(), headers=headers), timeout=30).close()


def check_completions(
    servers: list[ServerUnderTest], policy: Policy, requests: list[GenerationRequest], rows: list[list[Completion]], *, version: int = 3
) -> None:
    """Every completion asked for, from this policy's weights: nothing lost, doubled or stale."""
    checksums = {name: checksum(weight) for name, weight in named_weights(policy)}
    for request, row in zip(requests, rows, strict=True):
        assert [completion.policy_version for completion in row] == [version] * request.n
        for index, completion in enumerate(row):
            if servers[0].kind == "stand-in":
                expected = say(checksums, request.prompt_ids, request.seed + index, request.sampling.max_tokens)
                assert list(completion.token_ids) == expected
                continue
            (tree,) = pack([TrainSequence(prompt_ids=request.prompt_ids, target_ids=completion.token_ids)], max_tokens=4096)
            with torch.no_grad():
                logprobs, _ = policy(tree, temperature=TEMPERATURE)
            torch.testing.assert_close(tree.unpack(logprobs)[0], torch.tensor(completion.rollout_logprobs), atol=1e-3, rtol=0)


def generate_with_fault(
    engine: VLLMServerEngine, requests: list[GenerationRequest], fault: Callable[[], None], after_s: float
) -> list[list[Completion]]:
    timer = threading.Timer(after_s, fault)
    timer.start()
    try:
        return engine.generate(requests)
    finally:
        timer.join()


def many(requests: list[GenerationRequest], times: int) -> list[GenerationRequest]:
    return [replace(request, task_id=f"{turn}-{request.task_id}", seed=request.seed + 10_000 * turn) for turn in range(times) for request in requests]


def test_weights_go_out_completions_come_back(engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest], tmp_path: Path) -> None:
    rows = engine.generate(REQUESTS)
    check_completions(servers, policy, REQUESTS, rows)
    # Completion i of a request is the one that seed + i alone gives.
    alone = [engine.generate([replace(REQUESTS[2], n=1, seed=REQUESTS[2].seed + index)])[0][0] for index in range(4)]
    assert [completion.token_ids for completion in alone] == [completion.token_ids for completion in rows[2]]
    assert len({completion.token_ids for completion in alone}) == 4
    if servers[0].kind == "vllm":  # the stand-in knows no temperature
        greedy = engine.generate([replace(REQUESTS[0], sampling=replace(SAMPLING, temperature=0.0))])[0]
        assert [len(greedy), len({completion.token_ids for completion in greedy})] == [4, 1]
    # Read back, bit for bit, from every server.
    check_weights(engine, named_weights(policy), version=3, num_tensors=1000)
    held = engine.read_weights(["model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
    weights = dict(named_weights(policy))
    assert all(torch.equal(held[name], weights[name]) for name in held)
    # More files than one, and only those of the present version.
    engine.update_weights(named_weights(policy), version=4)
    (folder,) = (tmp_path / "weights").iterdir()
    assert (folder.name, len(list(folder.glob("*.safetensors"))) > 1) == ("weights-v4", True)
    assert engine.generate(REQUESTS[:1])[0][0].policy_version == 4
    engine.close()
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_server_killed_in_the_middle_of_generation(engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest]) -> None:
    requests = many(LONG_REQUESTS, 3)
    rows = generate_with_fault(engine, requests, servers[0].kill, after_s=0.3)
    check_completions(servers, policy, requests, rows)
    assert (engine.num_lost, engine.num_usable) == (1, 1)
    # It rejoins after it was started again and with the next update.
    servers[0].start()
    servers[0].wait_until_ready()
    assert engine.num_usable == 1
    engine.update_weights(named_weights(policy), version=5)
    assert engine.num_usable == 2
    check_weights(engine, named_weights(policy), version=5, num_tensors=1000)
    check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS), version=5)
    assert engine.num_lost == 1


def test_a_hung_server_runs_into_the_time_limit(make_engine, policy: Policy, servers: list[ServerUnderTest]) -> None:
    engine = make_engine(timeout_s=2.0)
    engine.update_weights(named_weights(policy), version=3)
    requests = many(LONG_REQUESTS, 3)
    rows = generate_with_fault(engine, requests, lambda: servers[1].signal(signal.SIGSTOP), after_s=0.3)
    check_completions(servers, policy, requests, rows)
    assert (engine.num_lost, engine.num_usable) == (1, 1)
    engine.update_weights(named_weights(policy), version=4)  # goes on without it
    assert (engine.version, engine.num_usable) == (4, 1)
    servers[1].signal(signal.SIGCONT)  # awake, with weights of version 3
    engine.update_weights(named_weights(policy), version=5)
    assert engine.num_usable == 2
    check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS), version=5)


def test_an_interruption_does_not_wait_for_servers(make_engine, policy: Policy, servers: list[ServerUnderTest]) -> None:
    """Both hang, which alone would take the time limit, and then the wait for one that comes back."""
    engine = make_engine(timeout_s=120.0)
    engine.update_weights(named_weights(policy), version=3)

    def fault() -> None:
        for server in servers:
            server.signal(signal.SIGSTOP)
        engine.interrupt()

    try:
        with pytest.raises(GenerationInterrupted):
            generate_with_fault(engine, many(LONG_REQUESTS, 3), fault, after_s=0.3)
    finally:
        for server in servers:
            server.signal(signal.SIGCONT)


def test_all_servers_gone_is_one_clear_error(make_engine, policy: Policy, servers: list[ServerUnderTest]) -> None:
    engine = make_engine(max_wait_s=2.0)
    engine.update_weights(named_weights(policy), version=3)

    def kill_all() -> None:
        for server in servers:
            server.kill()

    with pytest.raises(NoServerError, match=r"none of the 2 servers could be used for \d+ s .*max_wait_s=2.*--ckpt_path last"):
        generate_with_fault(engine, many(LONG_REQUESTS, 3), kill_all, after_s=0.3)
    with pytest.raises(NoServerError):
        engine.update_weights(named_weights(policy), version=4)
    assert engine.version is None


def test_servers_that_come_back_are_waited_for_and_given_their_weights(
    engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest]
) -> None:
    def restart_all() -> None:
        for server in servers:
            server.kill()
        servers[1].start()

    requests = many(LONG_REQUESTS, 2)
    rows = generate_with_fault(engine, requests, restart_all, after_s=0.3)
    check_completions(servers, policy, requests, rows)
    assert engine.num_lost == 2


def test_a_server_that_was_restarted_unnoticed_has_no_weights_of_ours(
    engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest]
) -> None:
    servers[0].kill()
    servers[0].start()
    servers[0].wait_until_ready()
    check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS))  # it is given them before it generates
    check_weights(engine, named_weights(policy), version=3, num_tensors=1000)


def test_a_server_that_comes_later_is_compared_too(engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest], tmp_path: Path) -> None:
    check_weights(engine, named_weights(policy), version=3)
    for file in (tmp_path / "weights" / "weights-v3").iterdir():  # a disk that changes what was written to it
        save_file({name: torch.zeros_like(weight) for name, weight in load_file(file).items()}, file)
    servers[0].kill()
    servers[0].start()
    servers[0].wait_until_ready()
    check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS))
    assert engine.num_usable == 1
    assert "loaded the weights of" in engine._out[servers[0].url]


def test_weights_that_change_under_a_completion_throw_it_away(engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest]) -> None:
    def meddle() -> None:
        call(servers[0], "/update_weight_version", {"new_version": "someone else's"})

    requests = many(LONG_REQUESTS, 3)
    check_completions(servers, policy, requests, generate_with_fault(engine, requests, meddle, after_s=0.3))
    assert engine.num_lost == 1


def test_wrong_weights_on_one_server_are_caught(engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest]) -> None:
    call(servers[1], "/weight_checker", {"action": "reset"})  # all zero; version and label stay
    with pytest.raises(SyncError, match=f"compared tensors differ .* in {servers[1].url}: model.embed_tokens.weight .largest difference 0.[1-9]"):
        check_weights(engine, named_weights(policy), version=3)


def test_servers_that_do_not_fit_the_run_are_refused(make_engine, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, max_model_len, message in [
        ({"dtype": "bfloat16"}, 64, "runs with dtype float32, not bfloat16"),
        ({}, MAX_MODEL_LEN + 1, "runs with max_model_len 256, less than 257"),
        ({"api_key_env": "NOT_SET"}, 64, "refuses our key: rollout.engine.api_key_env"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_engine(start=False, **changes).start(str(tiny_model_dir), seed=0, max_model_len=max_model_len)


@pytest.fixture
def two_ranks(servers: list[ServerUnderTest], tiny_model_dir: Path, tmp_path: Path) -> Iterator[Callable[[int], list[subprocess.Popen[str]]]]:
    """``two_ranks(max_tokens)`` starts them."""
    if servers[0].kind != "stand-in":
        pytest.skip("nothing here depends on the server")
    ranks: list[subprocess.Popen[str]] = []

    def start(max_tokens: int) -> list[subprocess.Popen[str]]:
        script, port = Path(__file__).with_name("two_rank_servers.py"), free_port()
        command = [sys.executable, str(script), str(tiny_model_dir), str(tmp_path / "weights"), str(max_tokens), *[server.url for server in servers]]
        group = {"RPT_SERVER_KEY": KEY, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        ranks.extend(subprocess.Popen(command, env=os.environ | group | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True) for rank in range(2))
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
def test_two_ranks_bring_back_servers_that_all_died(two_ranks, tiny_model_dir: Path, servers: list[ServerUnderTest]) -> None:
    """In the middle of a generation, when only ranks can help that did not publish the weights: one of them loads, once."""
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
    checksums = {name: checksum(weight) for name, weight in named_weights(unchanged(tiny_model_dir))}
    for rank in range(2):
        assert found[rank]["completions"] == [[say(checksums, [rank, i], 100 * rank + i + index, 240) for index in range(2)] for i in range(4)]
    assert all(num_loads(server) <= 1 for server in servers)
    assert sum(num_loads(server) for server in servers) >= 1


def num_loads(server: ServerUnderTest) -> int:
    """Of a stand-in, since it was started."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(server.url + "/collective_rpc", data=b'{"method": "rpt_describe"}', headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["results"][0]["num_loads"]


def unchanged(model: Path) -> Policy:
    policy = Policy(str(model))
    policy.materialize()
    return policy


@pytest.mark.long
def test_two_ranks_share_the_servers(two_ranks, tiny_model_dir: Path) -> None:
    first, second = said(two_ranks(8))
    checksums = {name: checksum(weight) for name, weight in named_weights(unchanged(tiny_model_dir))}
    for rank, found in enumerate((first, second)):
        assert found["completions"] == [[say(checksums, [rank, i], 100 * rank + i + index, 8) for index in range(2)] for i in range(4)]
    assert (first["version"], first["label"]) == (second["version"], second["label"]) == (2, first["label"])
    # A failure on the first rank in the middle of gathering is an error on both.
    assert first["error"].startswith("FileNotFoundError")
    assert second["error"].startswith("RuntimeError: rank 0: FileNotFoundError")
    assert first["version after the error"] is second["version after the error"] is None


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed here")
def test_a_server_that_is_split_over_devices(tiny_model_dir: Path, tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPT_SERVER_KEY", KEY)
    server = ServerUnderTest("vllm-split", tiny_model_dir, tmp_path)
    server.start()
    try:
        server.wait_until_ready()
        with VLLMServerEngine([server.url], SharedFolderTransport(str(tmp_path / "weights")), dtype="float32") as engine:
            engine.start(str(tiny_model_dir), seed=0, max_model_len=MAX_MODEL_LEN)
            engine.update_weights(named_weights(policy), version=3)
            check_weights(engine, named_weights(policy), version=3, num_tensors=1000)
            check_completions([server], policy, REQUESTS, engine.generate(REQUESTS))
            weights = dict(named_weights(policy))
            held = engine.read_weights(list(weights))
            assert all(torch.equal(held[name], weights[name]) for name in weights)
            call(server, "/weight_checker", {"action": "reset"})
            with pytest.raises(SyncError, match="compared tensors differ"):
                check_weights(engine, named_weights(policy), version=3)
    finally:
        server.kill()
