"""VLLMEngine frees its memory while the policy trains.

vLLM sleeps only on GPUs. A stand-in shows the order of calls, and the test with a real engine needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
from rpt_lightning.types import GenerationRequest, SamplingSettings


class RecordingLLM:
    """A stand-in for vLLM's LLM that records its calls in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(method)
        for _ in kwargs["weights_iterator"]:
            pass

    def apply_model(self, function: Callable[[torch.nn.Module], None]) -> list[None]:
        return [function(torch.nn.Module())]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return True


@pytest.fixture
def weights(tiny_model_dir: Path) -> dict[str, torch.Tensor]:
    policy = Policy(str(tiny_model_dir))
    policy.materialize()
    return dict(named_weights(policy))


@pytest.fixture
def engine(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> VLLMEngine:
    """An engine that is started with the stand-in for vLLM."""
    engine = VLLMEngine(dtype="float32", sleep_in_training=True)
    monkeypatch.setattr(engine, "_start", lambda model_path, seed: setattr(engine, "_llm", RecordingLLM()))
    monkeypatch.setattr(engine, "_forget_prompts", lambda: None)
    engine.start(str(tiny_model_dir), seed=0, max_model_len=64)
    return engine


def test_weights_have_memory_before_they_come_and_the_cache_after_them(
    engine: VLLMEngine, weights: dict[str, torch.Tensor]
) -> None:
    engine.update_weights(iter(weights.items()), version=0)
    engine.sleep()
    engine.sleep()  # a second call does nothing
    assert engine.version is None
    engine.update_weights(iter(weights.items()), version=1)
    engine.update_weights(iter(weights.items()), version=2)  # it is already awake
    assert engine._llm.calls == [
        *("reload_weights", "reset_prefix_cache"),
        "sleep 2",
        *("wake weights", "reload_weights", "wake kv_cache", "reset_prefix_cache"),
        *("reload_weights", "reset_prefix_cache"),
    ]


def test_the_trainers_free_memory_is_returned_before_vllm_takes_any(
    engine: VLLMEngine, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathering the weights leaves some in torch's allocator, where the cache cannot use it."""
    calls = engine._llm.calls
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    engine.update_weights(iter(weights.items()), version=0)
    engine.sleep()
    calls.clear()
    engine.update_weights(iter(weights.items()), version=1)
    assert calls == [
        *("empty_cache", "wake weights", "reload_weights"),
        *("empty_cache", "wake kv_cache", "reset_prefix_cache"),
    ]


def test_without_a_number_vllm_chooses_how_many_completions_run_on_a_gpu() -> None:
    assert VLLMEngine()._max_num_seqs(on_gpu=True) is None
    assert VLLMEngine()._max_num_seqs(on_gpu=False) == 128
    assert [VLLMEngine(max_num_seqs=7)._max_num_seqs(on_gpu=on_gpu) for on_gpu in (True, False)] == [7, 7]
    with pytest.raises(ValueError, match="max_num_seqs=0 must be at least 1; leave it out"):
        VLLMEngine(max_num_seqs=0)


def test_a_sleeping_engine_has_no_weights(engine: VLLMEngine, weights: dict[str, torch.Tensor]) -> None:
    engine.update_weights(iter(weights.items()), version=0)
    engine.sleep()
    request = GenerationRequest(
        task_id="doc:1",
        prompt_ids=(1, 2),
        n=1,
        seed=0,
        sampling=SamplingSettings(temperature=1.0, max_tokens=2, stop_token_ids=()),
    )
    with pytest.raises(RuntimeError, match="has no policy weights"):
        engine.generate([request])
    with pytest.raises(RuntimeError, match="sleeps and has no weights"):
        engine.read_weights(["lm_head.weight"])


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_cpu_it_is_refused(tiny_model_dir: Path) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ValueError, match=r"rollout\.engine\.sleep_in_training: vLLM sleeps on GPUs only"):
        VLLMEngine(sleep_in_training=True).start(str(tiny_model_dir), seed=0, max_model_len=64)


@pytest.mark.gpu
def test_memory_is_given_back_and_completions_stay_the_same(
    tiny_model_dir: Path, weights: dict[str, torch.Tensor]
) -> None:
    sampling = SamplingSettings(temperature=1.0, max_tokens=16, stop_token_ids=())
    requests = [
        GenerationRequest(task_id=f"doc:{i}", prompt_ids=(3, 5, 7 + i), n=2, seed=i, sampling=sampling)
        for i in range(4)
    ]
    with VLLMEngine(dtype="float32", gpu_memory_utilization=0.3, sleep_in_training=True) as engine:
        engine.start(str(tiny_model_dir), seed=0, max_model_len=64)
        engine.update_weights(iter(weights.items()), version=0)
        before, (free_awake, total) = engine.generate(requests), torch.cuda.mem_get_info()
        engine.sleep()
        assert torch.cuda.mem_get_info()[0] - free_awake > 0.2 * total
        engine.update_weights(iter(weights.items()), version=1)
        after = engine.generate(requests)
        assert [[c.token_ids for c in row] for row in after] == [[c.token_ids for c in row] for row in before]
        assert all(
            torch.equal(value, weights[name].cpu())
            for name, value in engine.read_weights(tuple(weights)).items()
        )
