"""What the real vLLM engine does to the process that it shares with the trainer."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
from rpt_lightning.types import GenerationRequest, SamplingSettings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        sys.platform != "linux" or importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here",
    ),
]

REQUEST = GenerationRequest(
    task_id="d:2",
    prompt_ids=(40, 41),
    n=4,
    seed=3,
    sampling=SamplingSettings(temperature=0.8, max_tokens=8, stop_token_ids=(7,)),
)


def test_other_systems_are_told_which_engine_to_use(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(
        ValueError,
        match=r"vLLM does not run on darwin; use the engine rpt_lightning.rollout.engines.hf_engine.HFEngine",
    ):
        VLLMEngine().start(str(tiny_model_dir), seed=0)


def test_vllms_own_worker_process_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING must be 0"):
        VLLMEngine().start(str(tiny_model_dir), seed=0)


@pytest.mark.long
def test_the_trainers_generators_and_threads_are_left_alone_and_a_second_engine_is_refused(
    tiny_model_dir: Path,
) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    set_num_threads, num_threads, cores = (
        torch.set_num_threads,
        torch.get_num_threads(),
        os.sched_getaffinity(0),
    )
    expected = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())

    def check() -> None:
        assert (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ) == expected
        assert torch.set_num_threads is set_num_threads
        assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (num_threads, cores)

    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with VLLMEngine(dtype="float32", kv_cache_gib=0.25) as engine:
        engine.start(str(tiny_model_dir), seed=0, max_model_len=512)
        check()
        with pytest.raises(RuntimeError, match="a VLLMEngine runs in this process already"):
            VLLMEngine().start(str(tiny_model_dir), seed=0)
        engine.update_weights(policy.named_parameters(remove_duplicate=False), version=0)
        check()
        greedy = replace(REQUEST, sampling=replace(REQUEST.sampling, temperature=0.0))
        engine.generate([REQUEST, greedy])  # a mixed batch draws from the global generator
        engine.read_weights(engine.weight_names)
        check()
    check()


def test_a_start_that_fails_leaves_room_for_the_next(tiny_model_dir: Path) -> None:
    engine = VLLMEngine(dtype="float32", kv_cache_gib=1e6)
    with pytest.raises(ValueError, match="memory"):
        engine.start(str(tiny_model_dir), seed=0)
    assert not torch.distributed.is_initialized()
    with VLLMEngine(dtype="float32", kv_cache_gib=0.25) as engine:
        engine.start(str(tiny_model_dir), seed=0)


def test_a_process_group_of_the_trainer_outlives_the_engine(tiny_model_dir: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for _ in range(2):
            with VLLMEngine(dtype="float32", kv_cache_gib=0.25) as engine:
                engine.start(str(tiny_model_dir), seed=0)
            ones = torch.ones(1)
            torch.distributed.all_reduce(ones)  # raises if the group is gone
    finally:
        torch.distributed.destroy_process_group()
    assert not torch.distributed.is_initialized()


def test_the_worker_gets_the_trainers_own_gpu(monkeypatch):
    """This is all that can be tested without GPUs. vLLM's own executor calls this and would return 0."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from rpt_lightning.compat.vllm.executor import OwnDeviceExecutor

    monkeypatch.setattr(UniProcExecutor, "_distributed_args", lambda self: ("file:///meeting", 0, 0))
    executor = object.__new__(OwnDeviceExecutor)
    assert executor._distributed_args() == ("file:///meeting", 0, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert executor._distributed_args() == ("file:///meeting", 0, 3)
