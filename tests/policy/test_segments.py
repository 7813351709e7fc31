"""The planned calls cover every permitted pair once, and cost less than a dense mask where that matters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import forest, forests, permitted

from rpt_lightning.policy.attention import segments
from rpt_lightning.policy.attention.segment_attention import segment_attention
from rpt_lightning.policy.attention.segments import SegmentCall, plan_segments
from rpt_lightning.policy.attention.tree_attention import TreeMask


@pytest.fixture(params=[1, 64, 4096], ids="call_cost={}".format)
def call_cost(request, monkeypatch):
    """Costs from one that allows cuts wherever possible to one that allows almost none."""
    monkeypatch.setattr(segments, "CALL_COST", request.param)
    monkeypatch.setattr(segments, "MERGE_COST", 0)
    monkeypatch.setattr(segments, "MAX_CHAIN", 7)


@pytest.mark.usefixtures("call_cost")
@settings(deadline=None)
@given(forests(60))
def test_every_permitted_pair_is_in_one_call(subtree_end):
    allowed = permitted(subtree_end)
    times = torch.zeros_like(allowed, dtype=torch.int64)
    squares = torch.zeros(len(subtree_end), dtype=torch.int64)
    seen_full = False
    for call in plan_segments(subtree_end):
        queries, keys = slice(call.query_start, call.query_stop), slice(call.key_start, call.key_stop)
        if call.kind == "full":
            seen_full = True
            assert allowed[queries, keys].all()
            times[queries, keys] += 1
        else:
            assert not seen_full
            assert queries == keys
            squares[queries] += 1
            # A causal call has no mask, so exactly what it computes must be permitted.
            times[queries, keys] += (
                torch.ones_like(times[queries, keys]).tril()
                if call.kind == "causal"
                else allowed[queries, keys]
            )
    assert torch.equal(times, allowed.long())
    assert (squares == 1).all()


def test_a_group_is_its_prompt_once_and_its_completions():
    """Plan a prompt of 600 with three completions of 300.

    There are two pieces of the prompt, each attended to by everything after it, and three causal calls.
    """
    calls = plan_segments(forest([0] * 900 + [300] + [0] * 299 + [300] + [0] * 299))
    full = [call for call in calls if call.kind == "full"]
    assert [(call.query_start, call.query_stop, call.key_start, call.key_stop) for call in full] == [
        (512, 1500, 0, 512),
        (600, 1500, 512, 600),
    ]
    assert [(call.kind, call.query_start, call.query_stop) for call in calls if call.kind != "full"] == [
        ("causal", 0, 512), ("causal", 512, 600), ("causal", 600, 900), ("causal", 900, 1200),
        ("causal", 1200, 1500),
    ]  # fmt: skip
    assert sum(call.num_pairs for call in calls) < 0.5 * 1500**2


def test_short_trees_are_one_masked_call():
    assert plan_segments(forest([0, 0, 1, 1, 0])) == (
        SegmentCall(kind="masked", query_start=0, query_stop=5, key_start=0, key_stop=5),
    )


def test_deep_trees_do_not_overflow_the_stack():
    """The trunk branches at each of 3,000 tokens."""
    subtree_end = forest([0, 0] + [1, 0] * 3000)
    assert max(call.query_stop for call in plan_segments(subtree_end)) == len(subtree_end)


@pytest.mark.usefixtures("call_cost")
@settings(max_examples=30, deadline=None)
@given(forests(40), st.integers(0, 99))
def test_attention_and_gradients_are_those_of_the_dense_mask(subtree_end, seed):
    generator = torch.Generator().manual_seed(seed)
    num = len(subtree_end)
    query, key, value, upstream = (
        torch.randn(1, heads, num, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2, 4)
    )
    mask = TreeMask(torch.tensor(subtree_end), permitted(subtree_end).sum(1) - 1)
    ours = segment_attention(query, key, value, mask.calls, mask.additive(torch.float64), scale=0.7)
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.7).masked_fill(
        ~permitted(subtree_end), -torch.inf
    )
    plain = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (query, key, value), upstream),
        torch.autograd.grad(plain, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
