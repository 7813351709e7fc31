"""An adapter in the real vLLM engine, beside the base's weights and merged into them, against the policy."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from test_vllm_sync import REQUESTS, TEMPERATURE, logprob_diff

from rpt_lightning.policy.adapter import Adapter
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.weights import adapter_weights, named_weights
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
from rpt_lightning.training.engine_check.logprob_diff import logprob_limits
from rpt_lightning.training.engine_check.sync_check import (
    SyncError,
    check_adapter,
    check_logprobs,
    check_weights,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.long,
    pytest.mark.skipif(
        sys.platform != "linux" or importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here",
    ),
]
assert TEMPERATURE < 1


def trained_policy(path, **settings):
    """A policy whose adapter changes log-probs by far more than any limit of the comparison."""
    policy = Policy(str(path), adapter=Adapter(**settings))
    policy.materialize()
    move(policy, seed=1)
    return policy


@torch.no_grad()
def move(policy, *, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in policy.named_adapter():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request, tiny_model_dir):
    with VLLMEngine(dtype=request.param, kv_cache_gib=0.25, max_adapter_rank=6) as engine:
        engine.start(str(tiny_model_dir), seed=0, max_model_len=256)
        yield engine


def send(engine, policy, version, *, base=None):
    given = named_weights(policy, merge=False) if base is None else base
    engine.update_adapter(adapter_weights(policy), base=given, version=version)


def check(engine, policy, version):
    check_weights(engine, named_weights(policy, merge=False), version=version, num_tensors=1000)
    check_adapter(engine, adapter_weights(policy), version=version)
    diff = logprob_diff(engine, policy)
    print(engine.dtype, diff)
    check_logprobs(diff, logprob_limits(engine.dtype, engine.dtype), version=version)


def unread():
    raise AssertionError("the engine holds the base")
    yield


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 6, "alpha": 5.0},
        {"rank": 4, "alpha": 6.0, "rslora": True},
        {"rank": 2, "alpha": 3.0, "targets": ["v_proj", "down_proj"]},
    ],
    ids=["all", "rslora", "some"],
)
def test_the_adapter_alone_is_synced(engine, tiny_model_dir, settings):
    policy = trained_policy(tiny_model_dir, **settings)
    send(engine, policy, 0)
    check(engine, policy, 0)
    before = engine.generate(REQUESTS)
    move(policy, seed=2)
    send(engine, policy, 1, base=unread())
    assert engine.version == 1
    check(engine, policy, 1)
    after = engine.generate(REQUESTS)
    assert before != after
    assert {completion.policy_version for row in after for completion in row} == {1}


def test_what_is_cached_belongs_to_one_adapter(engine, tiny_model_dir):
    # Only whole blocks of 32 tokens are cached.
    requests = [replace(request, prompt_ids=(request.prompt_ids * 64)[:64]) for request in REQUESTS]
    policy = trained_policy(tiny_model_dir, rank=6)
    send(engine, policy, 0)
    first = engine.generate(requests)
    again = engine.generate(requests)  # with every prompt cached
    assert engine.prompt_tokens.cached > 0
    assert [[c.token_ids for c in row] for row in first] == [[c.token_ids for c in row] for row in again]
    cached = engine.prompt_tokens.cached
    move(policy, seed=3)
    send(engine, policy, 1)
    one = requests[:1]
    engine.generate(one)
    # Only completions of the request share its prompt. Nothing is left of the earlier rounds.
    assert engine.prompt_tokens.cached - cached <= (one[0].n - 1) * len(one[0].prompt_ids)
    check(engine, policy, 1)


def test_a_stale_adapter_is_found(engine, tiny_model_dir):
    policy = trained_policy(tiny_model_dir, rank=4)
    send(engine, policy, 0)
    name = "model.layers.1.mlp.gate_proj.lora_B.default.weight"
    with torch.no_grad():
        dict(policy.named_adapter())[name][5, 2] += 0.5
    with pytest.raises(SyncError, match=rf"1 of \d+ tensors of the adapter differ .* such as {name}"):
        check_adapter(engine, adapter_weights(policy), version=0)


def test_a_rank_that_the_engine_lacks_is_named(engine, tiny_model_dir):
    policy = trained_policy(tiny_model_dir, rank=8)
    with pytest.raises(ValueError, match=r"takes adapters up to rank 6, and the policy's has rank 8"):
        send(engine, policy, 0)


def test_merged_weights_and_the_adapter_alone_give_the_same_engine(engine, tiny_model_dir):
    policy = trained_policy(tiny_model_dir, rank=6, alpha=5.0)
    engine.update_weights(named_weights(policy), version=0)
    check_weights(engine, named_weights(policy), version=0, num_tensors=1000)
    check_logprobs(logprob_diff(engine, policy), logprob_limits(engine.dtype, engine.dtype), version=0)
    merged = engine.generate(REQUESTS)
    send(engine, policy, 1)  # the base comes first, since the engine holds merged weights
    check(engine, policy, 1)
    alone = engine.generate(REQUESTS)
    if engine.dtype == torch.float32:  # in bf16, a merged weight is rounded
        assert [[c.token_ids for c in row] for row in merged] == [[c.token_ids for c in row] for row in alone]
