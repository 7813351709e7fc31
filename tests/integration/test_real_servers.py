"""Tests that need real vLLM servers, with ways of starting them that the other server tests do not use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from server_checks import REQUESTS, call, check_completions
from server_processes_for_tests import HAS_VLLM, KEY, MAX_MODEL_LEN, ServerUnderTest

from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.servers.server_engine import VLLMServerEngine
from rpt_lightning.rollout.weight_sync.transport import SharedFolderTransport
from rpt_lightning.training.engine_check.sync_check import SyncError, check_weights

pytestmark = [
    pytest.mark.long,
    pytest.mark.vllm,
    pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed here"),
]


@contextlib.contextmanager
def real_server(
    kind: str, model: Path, folder: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch, **options: int
) -> Iterator[tuple[ServerUnderTest, VLLMServerEngine]]:
    """Yield one server, and an engine that has given it the policy's weights as version 3."""
    monkeypatch.setenv("RPT_SERVER_KEY", KEY)
    server = ServerUnderTest(kind, model, folder, **options)
    server.start()
    try:
        server.wait_until_ready()
        with VLLMServerEngine(
            [server.url], SharedFolderTransport(str(folder / "weights")), dtype="float32"
        ) as engine:
            engine.start(str(model), seed=0, max_model_len=MAX_MODEL_LEN)
            engine.update_weights(named_weights(policy), version=3)
            yield server, engine
    finally:
        server.kill()


def test_a_server_that_is_split_over_devices(
    tiny_model_dir: Path, tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with real_server("vllm-split", tiny_model_dir, tmp_path, policy, monkeypatch) as (server, engine):
        check_weights(engine, named_weights(policy), version=3, num_tensors=1000)
        check_completions([server], policy, REQUESTS, engine.generate(REQUESTS))
        weights = dict(named_weights(policy))
        held = engine.read_weights(list(weights))
        assert all(torch.equal(held[name], weights[name]) for name in weights)
        call(server, "/weight_checker", {"action": "reset"})
        with pytest.raises(SyncError, match="compared tensors differ"):
            check_weights(engine, named_weights(policy), version=3)


def test_more_prompt_tokens_than_one_pass_takes(
    tiny_model_dir: Path, tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's engine on a CPU would end if a prompt were cut in two."""
    requests = [
        replace(
            REQUESTS[0],
            task_id=f"doc:{i}",
            prompt_ids=tuple((7 * i + j) % 500 for j in range(MAX_MODEL_LEN - 32)),
            n=1,
            seed=i,
        )
        for i in range(64)
    ]
    with real_server("vllm", tiny_model_dir, tmp_path, policy, monkeypatch, max_num_seqs=64) as (
        server,
        engine,
    ):
        rows = engine.generate(requests)
        check_completions([server], policy, requests, rows)
        assert engine.num_lost == 0
        # Some of the first 20 are at the border of a pass.
        for request, row in list(zip(requests, rows, strict=True))[:20]:
            assert engine.generate([request])[0][0].token_ids == row[0].token_ids
