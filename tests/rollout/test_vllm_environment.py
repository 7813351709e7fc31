"""What VLLMEngine sets in the environment before vLLM starts."""

from __future__ import annotations

import pytest

from rpt_lightning.rollout.engines.vllm.vllm_engine import own_cache


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, None),
        ({"LOCAL_RANK": "0", "SLURM_LOCALID": "3"}, None),
        ({"LOCAL_RANK": "2", "XDG_CACHE_HOME": "/cache"}, "/cache/vllm/local-rank-2"),
        ({"SLURM_LOCALID": "5", "XDG_CACHE_HOME": "/cache"}, "/cache/vllm/local-rank-5"),
        ({"LOCAL_RANK": "2", "VLLM_CACHE_ROOT": "/mine"}, None),
    ],
)
def test_each_process_of_a_node_caches_what_vllm_compiles_in_its_own_folder(environment, folder) -> None:
    assert own_cache(environment) == folder


def test_the_folder_lies_in_the_home_folder_by_default(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert own_cache({"LOCAL_RANK": "1"}) == "/home/somebody/.cache/vllm/local-rank-1"


def test_vllm_reads_the_folder_when_it_is_needed(monkeypatch) -> None:
    """The variable works although something may have imported vLLM before the engine starts."""
    envs = pytest.importorskip("vllm.envs")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/cache/vllm/local-rank-1")
    assert envs.VLLM_CACHE_ROOT == "/cache/vllm/local-rank-1"
