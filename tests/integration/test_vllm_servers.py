"""Rollouts on servers that fail: processes are killed, hang, or come back empty or with wrong weights.

Each test runs twice: against stand-in servers (real processes, known completions) and, marked `long`, against
the real vLLM.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from server_checks import LONG_REQUESTS, REQUESTS, SAMPLING, call, check_completions, many
from server_processes_for_tests import KEY, MAX_MODEL_LEN, ForeignProgram, ServerUnderTest

from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.engines.base import EngineLost, GenerationInterrupted
from rpt_lightning.rollout.servers.server import Server, ServerLost
from rpt_lightning.rollout.servers.server_engine import VLLMServerEngine
from rpt_lightning.rollout.weight_sync.folder_writer import FolderWriter
from rpt_lightning.rollout.weight_sync.transport import SharedFolderTransport
from rpt_lightning.training.engine_check.sync_check import SyncError, check_weights
from rpt_lightning.types import Completion, GenerationRequest, PromptTokens


@pytest.fixture
def make_engine(
    servers: list[ServerUnderTest], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., VLLMServerEngine]]:
    monkeypatch.setenv("RPT_SERVER_KEY", KEY)
    engines: list[VLLMServerEngine] = []

    def make(*, start: bool = True, **changes) -> VLLMServerEngine:
        settings = {
            "urls": [server.url for server in servers],
            "dtype": "float32",
            "timeout_s": 20.0,
            "max_wait_s": 300.0,
        } | changes
        engine = VLLMServerEngine(
            transport=SharedFolderTransport(str(tmp_path / "weights"), shard_gib=0.001), **settings
        )
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


def generate_with_fault(
    engine: VLLMServerEngine, requests: list[GenerationRequest], fault: Callable[[], None], after_s: float
) -> list[list[Completion]]:
    timer = threading.Timer(after_s, fault)
    timer.start()
    try:
        return engine.generate(requests)
    finally:
        timer.join()


def test_weights_go_out_completions_come_back(
    engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest], tmp_path: Path
) -> None:
    rows = engine.generate(REQUESTS)
    check_completions(servers, policy, REQUESTS, rows)
    # Completion i of a request is the one that seed + i gives alone.
    alone = [
        engine.generate([replace(REQUESTS[2], n=1, seed=REQUESTS[2].seed + index)])[0][0]
        for index in range(4)
    ]
    assert [completion.token_ids for completion in alone] == [completion.token_ids for completion in rows[2]]
    assert len({completion.token_ids for completion in alone}) == 4
    if servers[0].kind == "vllm":  # the stand-in ignores the temperature
        greedy = engine.generate([replace(REQUESTS[0], sampling=replace(SAMPLING, temperature=0.0))])[0]
        assert [len(greedy), len({completion.token_ids for completion in greedy})] == [4, 1]
    # Read back, bit for bit, from every server.
    check_weights(engine, named_weights(policy), version=3, num_tensors=1000)
    held = engine.read_weights(["model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
    weights = dict(named_weights(policy))
    assert all(torch.equal(held[name], weights[name]) for name in held)
    # There are several files of the first version. The second one is the same, so it has none.
    engine.update_weights(named_weights(policy), version=4)
    first, second = sorted((tmp_path / "weights").iterdir())
    assert [first.name, second.name] == ["weights-v3", "weights-v4"]
    assert len(list(first.glob("*.safetensors"))) > 1
    assert list(second.glob("*.safetensors")) == []
    assert engine.generate(REQUESTS[:1])[0][0].policy_version == 4
    engine.close()
    assert list((tmp_path / "weights").iterdir()) == []


def test_prompts_are_counted_as_servers_share_them(engine: VLLMServerEngine) -> None:
    """Of 70 tokens, 64 are in whole blocks of 16 or 32. All completions but the first find these cached."""
    before = engine.prompt_tokens
    assert before is not None
    request = replace(REQUESTS[0], prompt_ids=tuple(range(40, 110)))
    for cached in (3 * 64, 3 * 64 + 4 * 64):
        engine.generate([request])
        assert engine.prompt_tokens is not None
        assert (engine.prompt_tokens - before).cached == cached
    assert engine.prompt_tokens - before == PromptTokens(total=2 * 4 * 70, cached=7 * 64, shareable=0)


def test_a_server_killed_in_the_middle_of_generation(
    engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest]
) -> None:
    requests = many(LONG_REQUESTS, 3)
    rows = generate_with_fault(engine, requests, servers[0].kill, after_s=0.3)
    check_completions(servers, policy, requests, rows)
    assert (engine.num_lost, engine.num_usable) == (1, 1)
    # It rejoins after a restart, with the next update.
    servers[0].start()
    servers[0].wait_until_ready()
    assert engine.num_usable == 1
    engine.update_weights(named_weights(policy), version=5)
    assert engine.num_usable == 2
    check_weights(engine, named_weights(policy), version=5, num_tensors=1000)
    check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS), version=5)
    assert engine.num_lost == 1


def test_a_hung_server_runs_into_the_time_limit(
    make_engine, policy: Policy, servers: list[ServerUnderTest]
) -> None:
    engine = make_engine(timeout_s=2.0)
    engine.update_weights(named_weights(policy), version=3)
    requests = many(LONG_REQUESTS, 3)
    rows = generate_with_fault(engine, requests, lambda: servers[1].signal(signal.SIGSTOP), after_s=0.3)
    check_completions(servers, policy, requests, rows)
    assert (engine.num_lost, engine.num_usable) == (1, 1)
    engine.update_weights(named_weights(policy), version=4)  # continues without it
    assert (engine.version, engine.num_lost, engine.num_usable) == (4, 1, 1)
    servers[1].signal(signal.SIGCONT)  # awake again, with weights of version 3
    engine.update_weights(named_weights(policy), version=5)
    assert engine.num_usable == 2
    check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS), version=5)


def test_an_interruption_does_not_wait_for_servers(
    make_engine, policy: Policy, servers: list[ServerUnderTest]
) -> None:
    """Both servers hang. That alone would take the time limit and then the wait for a server to return."""
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


def test_all_servers_gone_is_one_clear_error(
    make_engine, policy: Policy, servers: list[ServerUnderTest]
) -> None:
    engine = make_engine(max_wait_s=2.0)
    engine.update_weights(named_weights(policy), version=3)

    def kill_all() -> None:
        for server in servers:
            server.kill()

    with pytest.raises(
        EngineLost, match=r"none of the 2 servers could be used for \d+ s .*max_wait_s=2.*--ckpt_path last"
    ):
        generate_with_fault(engine, many(LONG_REQUESTS, 3), kill_all, after_s=0.3)
    with pytest.raises(EngineLost):
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
    # It gets the weights before it generates.
    check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS))
    check_weights(engine, named_weights(policy), version=3, num_tensors=1000)


def test_steps_send_only_what_changed(
    engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest]
) -> None:
    """A server misses two of the steps. Another one starts anew. At the end both hold every bit."""
    start = {name: weight.clone() for name, weight in policy.state_dict().items()}
    assert engine.sent_weights is not None
    full_bytes = engine.sent_weights.num_bytes
    generator = torch.Generator().manual_seed(0)
    try:
        for version in range(4, 10):
            with torch.no_grad():
                for parameter in policy.parameters():
                    changes = torch.rand(parameter.shape, generator=generator) < 0.01
                    parameter[changes] += 0.01
            if version == 5:
                servers[0].signal(signal.SIGSTOP)
                engine.timeout_s = engine._fleet._limits["timeout_s"] = 2.0
            if version == 7:
                servers[0].signal(signal.SIGCONT)
                engine.timeout_s = engine._fleet._limits["timeout_s"] = 20.0
            if version == 8:
                servers[1].kill()
                servers[1].start()
                servers[1].wait_until_ready()
            engine.update_weights(named_weights(policy), version=version)
            assert engine.num_usable == (1 if version in (5, 6) else 2)
            assert 0.005 < engine.sent_weights.changed_frac < 0.015
            assert engine.sent_weights.num_bytes < 0.06 * full_bytes
            check_weights(engine, named_weights(policy), version=version, num_tensors=1000)
        check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS), version=9)
    finally:
        policy.load_state_dict(start)


def test_damaged_weights_are_written_again(
    engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest], tmp_path: Path
) -> None:
    check_weights(engine, named_weights(policy), version=3)
    for file in (tmp_path / "weights" / "weights-v3").glob("*.safetensors"):  # like a disk that goes bad
        save_file({name: torch.zeros_like(weight) for name, weight in load_file(file).items()}, file)
    servers[0].kill()
    servers[0].start()
    servers[0].wait_until_ready()
    check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS))
    assert engine.num_usable == 2


def test_a_server_that_comes_later_is_compared_too(
    engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest], tmp_path: Path
) -> None:
    """Here the checksums on the disk are wrong too, as if the trainer itself had written other weights."""
    check_weights(engine, named_weights(policy), version=3)
    zeros = [(name, torch.zeros_like(weight)) for name, weight in named_weights(policy)]
    (tmp_path / "other").mkdir()
    other = FolderWriter(tmp_path / "other", shard_bytes=2**30, full_every=10)
    folder = other.write(zeros, version=3, dtype=torch.float32)
    shutil.rmtree(tmp_path / "weights" / "weights-v3")
    folder.rename(tmp_path / "weights" / "weights-v3")
    servers[0].kill()
    servers[0].start()
    servers[0].wait_until_ready()
    check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS))
    assert engine.num_usable == 1
    assert "should hold the weights of" in engine._out[servers[0].url]


@pytest.mark.parametrize("wrong", [False, True])
def test_a_server_that_could_not_be_compared_is_compared_before_it_generates(
    engine: VLLMServerEngine,
    policy: Policy,
    servers: list[ServerUnderTest],
    monkeypatch: pytest.MonkeyPatch,
    wrong: bool,
) -> None:
    """Otherwise a comparison that fails everywhere would look like one that found nothing."""
    checksums, asked = Server.checksums, []

    async def fails_at_first(self: Server, names: Sequence[str]) -> dict[str, str]:
        asked.append(self.url)
        if len(asked) <= len(servers):
            raise ServerLost(f"{self.url}: status 500")
        return await checksums(self, names)

    monkeypatch.setattr(Server, "checksums", fails_at_first)
    check_weights(engine, named_weights(policy), version=3)
    assert engine.num_usable == 0
    if wrong:
        call(servers[1], "/weight_checker", {"action": "reset"})  # all zero, with the same version and label
    check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS))
    assert engine.num_usable == (1 if wrong else 2)
    assert sorted(asked) == sorted(2 * [server.url for server in servers])
    engine.generate(REQUESTS)
    assert len(asked) == 4  # each is compared only once


def test_a_server_that_is_found_gone_between_two_generations_counts_as_lost(
    engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest]
) -> None:
    engine.generate(REQUESTS)
    servers[0].kill()
    for version in (4, 5):  # it counts once, however many updates it misses
        engine.update_weights(named_weights(policy), version=version)
        assert (engine.num_lost, engine.num_usable) == (1, 1)


def test_another_program_on_a_servers_port(
    engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest]
) -> None:
    """The program may also answer everything, but not as a server would."""
    for version, answer in ((3, "404 Not Found"), (5, "200 OK")):
        servers[0].kill()
        with ForeignProgram(servers[0].port, answer):
            check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS), version=version)
            assert engine.num_usable == 1
            engine.update_weights(named_weights(policy), version=version + 1)
            check_completions(servers, policy, REQUESTS, engine.generate(REQUESTS), version=version + 1)
        servers[0].start()
        servers[0].wait_until_ready()
        engine.update_weights(named_weights(policy), version=version + 2)
        assert engine.num_usable == 2


def test_weights_that_change_under_a_completion_throw_it_away(
    engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest]
) -> None:
    def meddle() -> None:
        call(servers[0], "/update_weight_version", {"new_version": "someone else's"})

    requests = many(LONG_REQUESTS, 3)
    check_completions(servers, policy, requests, generate_with_fault(engine, requests, meddle, after_s=0.3))
    assert engine.num_lost == 1


def test_wrong_weights_on_one_server_are_caught(
    engine: VLLMServerEngine, policy: Policy, servers: list[ServerUnderTest]
) -> None:
    call(servers[1], "/weight_checker", {"action": "reset"})  # all zero, with the same version and label
    with pytest.raises(
        SyncError,
        match=f"compared tensors differ .* in {servers[1].url}: model.embed_tokens.weight.* "
        r".largest difference 0.[1-9]",
    ):
        check_weights(engine, named_weights(policy), version=3)


def test_servers_that_do_not_fit_the_run_are_refused(
    make_engine, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes, max_model_len, message in [
        ({"dtype": "bfloat16"}, 64, "runs with dtype float32, not bfloat16"),
        ({}, MAX_MODEL_LEN + 1, "runs with max_model_len 256, less than 257"),
        ({"api_key_env": "NOT_SET"}, 64, "refuses our key: rollout.engine.api_key_env"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_engine(start=False, **changes).start(
                str(tiny_model_dir), seed=0, max_model_len=max_model_len
            )
