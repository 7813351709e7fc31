"""Policy and the real vLLM engine over optimizer steps: what the check after each sync can and cannot see."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing.trees import pack
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
from rpt_lightning.training.engine_check.logprob_diff import compare_logprobs, logprob_limits
from rpt_lightning.training.engine_check.sync_check import SyncError, check_logprobs, check_weights
from rpt_lightning.types import GenerationRequest, SamplingSettings, TrainSequence

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        sys.platform != "linux" or importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here",
    ),
]

TEMPERATURE = 0.8
SAMPLING = SamplingSettings(temperature=TEMPERATURE, max_tokens=24, stop_token_ids=(1,))
REQUESTS = [
    GenerationRequest(
        task_id=f"d:{i}", prompt_ids=tuple(range(40 + i, 60 + 3 * i)), n=4, seed=100 * i, sampling=SAMPLING
    )
    for i in range(4)
]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, tiny_model_dir: Path):
    with VLLMEngine(dtype=request.param, kv_cache_gib=0.25) as engine:
        engine.start(str(tiny_model_dir), seed=0, max_model_len=256)
        yield engine


@pytest.fixture
def policy(tiny_model_dir: Path) -> Policy:
    policy = Policy(str(tiny_model_dir))
    policy.materialize()
    return policy


def step(policy: Policy) -> None:
    """Make one optimizer step as in RPT: fp32 master weights, AdamW, lr 1e-6."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, betas=(0.9, 0.999), weight_decay=0.01)
    (tree,) = pack(
        [TrainSequence(prompt_ids=(40, 41, 42), target_ids=tuple(range(100, 200)))], max_tokens=4096
    )
    logprobs, _ = policy(tree)
    (-logprobs.mean()).backward()
    optimizer.step()


def logprob_diff(engine: VLLMEngine, policy: Policy):
    rollout, scored = [], []
    for request, row in zip(REQUESTS, engine.generate(REQUESTS), strict=True):
        for completion in row:
            (tree,) = pack(
                [TrainSequence(prompt_ids=request.prompt_ids, target_ids=completion.token_ids)],
                max_tokens=4096,
            )
            with (
                torch.no_grad(),
                torch.autocast("cpu", torch.bfloat16, enabled=engine.dtype == torch.bfloat16),
            ):
                logprobs, _ = policy(tree, temperature=TEMPERATURE)
            (values,) = tree.unpack(logprobs)
            rollout.append(torch.tensor(completion.rollout_logprobs))
            scored.append(values)
    return compare_logprobs(
        torch.cat(rollout)[None], torch.cat(scored)[None], torch.ones(1, sum(map(len, scored)))
    )


def test_engine_and_policy_agree_after_a_sync(engine: VLLMEngine, policy: Policy) -> None:
    engine.update_weights(named_weights(policy), version=0)
    check_weights(engine, named_weights(policy), version=0, num_tensors=1000)
    diff = logprob_diff(engine, policy)
    print(engine.dtype, diff)
    check_logprobs(diff, logprob_limits(engine.dtype, engine.dtype), version=0)
    step(policy)
    engine.update_weights(named_weights(policy), version=1)
    check_weights(engine, named_weights(policy), version=1, num_tensors=1000)
    check_logprobs(logprob_diff(engine, policy), logprob_limits(engine.dtype, engine.dtype), version=1)


def test_an_engine_one_step_behind_is_caught_by_its_version(engine: VLLMEngine, policy: Policy) -> None:
    engine.update_weights(named_weights(policy), version=0)
    step(policy)
    with pytest.raises(SyncError, match="policy is at version 1, the engine at 0"):
        check_weights(engine, named_weights(policy), version=1)


def test_an_engine_one_step_behind_is_caught_by_its_tensors(engine: VLLMEngine, policy: Policy) -> None:
    engine.update_weights(named_weights(policy), version=1)
    step(policy)
    for version in range(1, 6):  # whichever tensors are compared
        engine._version = version  # the version claims that all is well
        with pytest.raises(SyncError, match=r"compared tensors differ .*model.embed_tokens.weight"):
            check_weights(engine, named_weights(policy), version=version, num_tensors=4)
    # bf16's own noise hides such a step in log-probs. In fp32, log-probs show it too.
    limits = logprob_limits(engine.dtype, engine.dtype)
    engine._version = 1
    with pytest.raises(SyncError) if engine.dtype == torch.float32 else contextlib.nullcontext():
        check_logprobs(logprob_diff(engine, policy), limits, version=1)


def test_what_rounding_hides_is_truly_equal(engine: VLLMEngine, policy: Policy) -> None:
    before = {name: weight.to(engine.dtype, copy=True) for name, weight in named_weights(policy)}
    step(policy)
    moved = {
        name: (weight.to(engine.dtype) != before[name]).float().mean().item()
        for name, weight in named_weights(policy)
    }
    print(engine.dtype, {name: f"{share:.4f}" for name, share in moved.items()})
    if engine.dtype == torch.float32:
        assert min(moved.values()) > 0.9
    else:
        # Norms of exactly 1 change by 1e-6, while the spacing is 2^-8. No entry changes, and the engine would
        # compute the same with either.
        assert all((share == 0) == ("norm" in name) for name, share in moved.items())
        assert max(moved.values()) < 0.5
    engine.update_weights(named_weights(policy), version=1)
    check_weights(engine, named_weights(policy), version=1, num_tensors=1000)
