"""The warm-up meets every length that a step can meet, forwards and backwards, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.policy.attention.block_mask import bucket_length, bucket_lengths
from rpt_lightning.policy.model import Policy
from rpt_lightning.training.modules.warm_up import forked_tree, warm_up
from rpt_lightning.types import TrainSequence

CPU = torch.device("cpu")


class Watched:
    """A policy that notes its trees."""

    def __init__(self, policy):
        self.policy, self.seen = policy, []
        self.shares_prefixes = True
        self.pack = policy.pack

    def __call__(self, tree):
        self.seen.append((bucket_length(tree.num_tokens, tree.max_tokens), torch.is_grad_enabled()))
        assert not tree.tree_mask().is_chain
        return self.policy(tree)


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    policy = Policy(str(tiny_model_dir))
    policy.materialize()
    return policy


@pytest.mark.parametrize("max_tokens", [128, 1000])
def test_every_length_is_met(policy, max_tokens):
    watched, losses = Watched(policy), []

    def backward(loss):
        losses.append(loss.item())
        loss.backward()

    warm_up(watched, max_tokens=max_tokens, device=CPU, backward=backward)
    assert watched.seen == [(n, grad) for n in bucket_lengths(max_tokens) for grad in (True, False)]
    assert losses == [0.0] * len(bucket_lengths(max_tokens))
    assert all(not weight.grad.any() for weight in policy.parameters())


def test_models_that_take_rows_compile_nothing(policy, monkeypatch):
    monkeypatch.setattr(policy, "shares_prefixes", False)
    warm_up(policy, max_tokens=1000, device=CPU, backward=lambda loss: pytest.fail("it ran"))


@given(st.integers(3, 500))
def test_a_forked_tree_has_that_many_tokens(policy, num_tokens):
    tree = forked_tree(policy, num_tokens, max_tokens=7)
    assert (tree.num_tokens, tree.max_tokens) == (num_tokens, 7)


def test_a_packed_tree_knows_its_budget(policy):
    sequences = [TrainSequence(prompt_ids=(1,) * 60, target_ids=(2, n)) for n in range(3)]
    assert {tree.max_tokens for tree in policy.pack(sequences, max_tokens=64)} == {64}


def test_layers_are_compiled_on_gpus_unless_a_flag_says_otherwise(tiny_model_dir):
    gpu = torch.device("cuda", 1)
    for given_flag, device, compiled in [
        (None, gpu, True),
        (None, CPU, False),
        (False, gpu, False),
        (True, CPU, True),
    ]:
        policy = Policy(str(tiny_model_dir), compile_layers=given_flag)
        policy.train_on(device)
        assert policy.compile_layers is compiled
