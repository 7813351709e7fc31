from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpt_lightning.rollout.engines.hf_engine import HFEngine
from rpt_lightning.training.engine_check.sync_check import (
    SyncError,
    check_weights,
    sampled_columns,
    sampled_names,
)

NAMES = ["model.embed_tokens.weight", *[f"w{index}" for index in range(7)], "lm_head.weight"]


def test_embedding_and_head_always_and_the_others_in_turn() -> None:
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    assert sampled_names(NAMES, 0, 3) == (*ends, "w0", "w1", "w2")
    assert sampled_names(NAMES, 1, 3) == (*ends, "w3", "w4", "w5")
    assert sampled_names(NAMES, 2, 3) == (*ends, "w6", "w0", "w1")
    assert sorted(sampled_names(NAMES, 5, 100)) == sorted(NAMES)
    assert {name for turn in range(40, 43) for name in sampled_names(NAMES, turn, 3)} == set(NAMES)


@pytest.mark.parametrize("num_others", range(1, 40))
def test_every_tensor_is_looked_at_in_turn(num_others: int) -> None:
    names = [f"w{index}" for index in range(num_others)]
    for num_tensors in range(1, 9):
        assert {
            name
            for turn in range(-(-num_others // num_tensors))
            for name in sampled_names(names, turn, num_tensors)
        } == set(names)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64, 576, 577])
def test_every_column_is_looked_at_in_turn(width: int) -> None:
    seen = [column for turn in range(100, 108) for column in range(width)[sampled_columns(width, turn, 8)]]
    assert set(seen) == set(range(width))
    assert [sampled_columns(576, turn, 8) for turn in (0, 1, 7, 8)] == [
        slice(0, 72),
        slice(72, 144),
        slice(504, 576),
        slice(0, 72),
    ]


@pytest.fixture
def policy(tiny_model_dir: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def weights(policy):
    return policy.named_parameters(remove_duplicate=False)


@pytest.fixture(params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, tiny_model_dir: Path, policy):
    with HFEngine(dtype=request.param, device="cpu") as engine:
        engine.start(str(tiny_model_dir), seed=0)
        engine.update_weights(weights(policy), version=0)
        yield engine


def test_an_engine_in_step_passes_for_every_tensor(engine: HFEngine, policy) -> None:
    check_weights(engine, weights(policy), version=0, num_tensors=1000)


def test_a_version_that_was_not_acknowledged_is_an_error(engine: HFEngine, policy) -> None:
    with pytest.raises(SyncError, match="policy is at version 1, the engine at 0"):
        check_weights(engine, weights(policy), version=1)


def test_one_stale_tensor_is_found_and_named(engine: HFEngine, policy) -> None:
    with torch.no_grad():
        policy.model.layers[2].mlp.down_proj.weight[0, 0] += 0.5
    with pytest.raises(
        SyncError,
        match=r"1 of 39 .* model.layers.2.mlp.down_proj.weight "
        r"\(largest difference 0.5, 1 of 57344 entries\)",
    ):
        check_weights(engine, weights(policy), version=0, num_tensors=1000)


def test_a_head_of_the_step_before_is_found_in_any_slice_and_a_single_entry_in_its_own(
    engine: HFEngine, policy
) -> None:
    head = policy.lm_head.weight
    before = head.detach().clone()
    with torch.no_grad():
        head += 0.01 * head.abs().max()
    for turn in range(8):
        with pytest.raises(SyncError, match=r"lm_head.weight\[:, \d+:\d+\] \(largest"):
            check_weights(engine, weights(policy), version=0, turn=turn)
    with torch.no_grad():
        head.copy_(before)[5, -1] += 0.5
    for turn in range(7):
        check_weights(engine, weights(policy), version=0, turn=turn)
    with pytest.raises(SyncError, match=r"largest difference 0.5, 1 of "):
        check_weights(engine, weights(policy), version=0, turn=7)


def test_a_policy_with_other_names_is_an_error(engine: HFEngine, policy) -> None:
    without_head = [(name, weight) for name, weight in weights(policy) if name != "lm_head.weight"]
    with pytest.raises(SyncError, match=r"lm_head.weight \(the policy has no such weight\)"):
        check_weights(engine, without_head, version=0)
