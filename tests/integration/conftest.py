"""Two servers, stand-ins or the real vLLM, for tests that break them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from server_processes_for_tests import HAS_VLLM, ServerUnderTest

from rpt_lightning.policy.model import Policy

REAL = [
    pytest.mark.long,
    pytest.mark.vllm,
    pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed here"),
]


@pytest.fixture(scope="module", params=["stand-in", pytest.param("vllm", marks=REAL)])
def all_servers(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[ServerUnderTest]]:
    servers = [
        ServerUnderTest(request.param, tiny_model_dir, tmp_path_factory.mktemp("logs")) for _ in range(2)
    ]
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
    """Both servers, running. A test may break them."""
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
