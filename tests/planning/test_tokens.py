from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.planning.workload import assumed_prompts, step_tokens
from rpt_lightning.policy.flops import Work


def test_a_step_by_hand():
    """Two documents with two positions each have prompts of 3 and 5 tokens, and of 3 and 4 tokens.

    Each prompt has two completions of 3 tokens, of which the last is not fed.
    """
    prompts = [(1, 2, 3), (1, 2, 3, 4, 5), (7, 8, 9), (7, 8, 9, 10)]
    tokens = step_tokens(
        prompts, group_size=2, completion_tokens=3, live_frac=1.0, micro_batch_tokens=1000, num_ranks=1
    )
    # 1..5 and 1..4, where each token attends to those before it
    assert tokens.prefill == Work(tokens=5 + 4, pairs=15 + 10)
    assert tokens.prefill_alone == Work(tokens=2 * 15, pairs=2 * (6 + 15 + 6 + 10))
    # Two of three sampled tokens are fed, after 3, 5, 3 and 4
    assert tokens.sampling == Work(
        tokens=2 * 4 * 2, scored_tokens=24, pairs=2 * ((4 + 5) + (6 + 7) + (4 + 5) + (5 + 6))
    )
    assert tokens.mean_prompt_tokens == 15 / 4
    assert tokens.packed.tokens == 5 + 4 + 8 * 2
    # Prompts: 1..5 and 1..4; completions: two tokens after 3, 5, 3 and 4
    assert tokens.packed.pairs == 15 + 10 + 2 * ((4 + 5) + (6 + 7) + (4 + 5) + (5 + 6))
    assert tokens.plain == Work(tokens=2 * (6 + 8 + 6 + 7), scored_tokens=24, pairs=2 * (21 + 36 + 21 + 28))
    assert tokens.packed.scored_tokens == 24
    assert (tokens.micro_batches, tokens.busy_ranks) == (1, 1)


def test_contexts_are_trained_once():
    """The first of two documents has prompts of 3 and 5 tokens, and the second has one of 3.

    Only the second document's group is live. Each of its two completions has 2 tokens, of which the last is
    not fed.
    """
    prompts = [(1, 2, 3), (1, 2, 3, 4, 5), (7, 8, 9)]
    usual = {"group_size": 2, "completion_tokens": 2, "live_frac": 1 / 3, "micro_batch_tokens": 1000}
    without = step_tokens(prompts, num_ranks=1, **usual)
    tokens = step_tokens(prompts, num_ranks=1, trains_contexts=True, **usual)
    # The live prompt is fed anyway. 1 to 4 are fed too, because 5 is only a target.
    assert without.packed == Work(tokens=3 + 2, scored_tokens=4, pairs=6 + 2 * 4)
    assert tokens.packed.tokens - without.packed.tokens == 4
    assert tokens.packed.pairs - without.packed.pairs == 1 + 2 + 3 + 4
    # 2 to 5, 8 and 9 are targets
    assert tokens.packed.scored_tokens - without.packed.scored_tokens == 6
    # Generation does not change
    assert (tokens.prefill, tokens.sampling) == (without.prefill, without.sampling)


def test_ranks_share_nothing_with_each_other():
    prompts = [(1, 2, 3), (1, 2, 3, 4, 5)]
    together = step_tokens(
        prompts, group_size=2, completion_tokens=3, live_frac=1.0, micro_batch_tokens=1000, num_ranks=1
    )
    apart = step_tokens(
        prompts, group_size=2, completion_tokens=3, live_frac=1.0, micro_batch_tokens=1000, num_ranks=2
    )
    idle = step_tokens(
        prompts, group_size=2, completion_tokens=3, live_frac=1.0, micro_batch_tokens=1000, num_ranks=4
    )
    assert apart.packed.tokens == together.packed.tokens + 3
    assert apart.busiest.tokens == 5 + 4
    assert idle.packed == apart.packed
    assert idle.busy_ranks == 2


def test_a_small_budget_computes_prompts_again():
    tokens = step_tokens(
        [(1, 2, 3)], group_size=4, completion_tokens=3, live_frac=1.0, micro_batch_tokens=9, num_ranks=1
    )
    assert tokens.micro_batches == 2  # 3 + 2 x 3 tokens each, leaves included
    assert tokens.packed.tokens == 2 * (3 + 2 * 2)


@given(st.integers(1, 9), st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from([1, 2, 16]))
def test_only_live_groups_are_trained(num_tasks, live_frac, num_ranks):
    """At least one group is live, and the share holds however few tasks a rank has."""
    prompts = assumed_prompts(
        num_tasks=num_tasks, positions_per_document=1, context_tokens=4, template_tokens=0
    )
    tokens = step_tokens(
        prompts,
        group_size=2,
        completion_tokens=2,
        live_frac=live_frac,
        micro_batch_tokens=1000,
        num_ranks=num_ranks,
    )
    assert tokens.packed.scored_tokens == max(1, int(num_tasks * live_frac)) * 4
    assert tokens.num_completions == num_tasks * 2


@pytest.mark.parametrize("positions", [1, 2, 4])
def test_assumed_contexts_have_the_assumed_mean(positions):
    prompts = assumed_prompts(
        num_tasks=8, positions_per_document=positions, context_tokens=100, template_tokens=7
    )
    assert sum(map(len, prompts)) / 8 == pytest.approx(107)
    tokens = step_tokens(
        prompts, group_size=2, completion_tokens=1, live_frac=1.0, micro_batch_tokens=10**6, num_ranks=1
    )
    longest = 200 * positions // (positions + 1)
    assert tokens.prefill.tokens == pytest.approx(8 // positions * longest + 8 * 7)
