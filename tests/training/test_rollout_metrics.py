"""The logged metrics of a step over all ranks.

A rank may have no task, because there are more ranks than tasks.
"""

from __future__ import annotations

import functools
import json
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from rpt_lightning.metrics.rollout_stats import STATISTICS, rollout_statistics
from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.policy.flops import Work
from rpt_lightning.rollout.dynamic_sampling import FilledBatch
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.settings import DynamicSampling
from rpt_lightning.rollout.weight_sync.sent_weights import SentWeights
from rpt_lightning.training.callbacks.logs import StepLog
from rpt_lightning.training.distributed.reduced_metrics import over_ranks
from rpt_lightning.training.step.metrics import (
    rollout_metrics,
    rollout_work,
    sent_metrics,
    server_metrics,
)
from rpt_lightning.training.step.rollout_step import StepRoller
from rpt_lightning.types import Completion, PromptTokens, RolloutGroup, TokenTask

TASK = TokenTask(
    task_id="d:1", doc_id="d", position=1, context_ids=(1,), continuation_ids=(2,), continuation=(b"a",),
    entropy=1, true_prob=0.5, true_rank=0,
    answerable=True,
)  # fmt: skip


def group(prompt_tokens: int, *lengths: int) -> RolloutGroup:
    completions = tuple(
        Completion(
            token_ids=(7,) * length,
            text_bytes=b"",
            rollout_logprobs=(0.0,) * length,
            policy_version=0,
            finish_reason="stop",
        )
        for length in lengths
    )
    return RolloutGroup(
        task=TASK,
        prompt_ids=(1,) * prompt_tokens,
        completions=completions,
        predictions=(None,) * len(lengths),
        rewards=(0.0,) * len(lengths),
    )


NOTHING = FilledBatch(groups=(), replaced=(), num_rounds=0)
SOMETHING = FilledBatch(groups=(group(4, 3, 1),), replaced=(group(2, 2),), num_rounds=1)


@pytest.mark.parametrize("pilot_size", [None, 2])
def test_a_rank_without_tasks_says_the_same_names(pilot_size):
    empty, full = (rollout_metrics(filled, pilot_size=pilot_size) for filled in (NOTHING, SOMETHING))
    assert empty.keys() == full.keys()
    assert set(empty.values()) == {0.0}
    assert set(rollout_statistics(SOMETHING.groups)) == set(STATISTICS)


def test_work_of_rollouts_by_hand():
    # Prompts: 2 x 4 tokens with 10 pairs each, and 2 with 3. Sampled: 3 (2 fed, at depths 5 and 6), 1 (none),
    # 2 (1, at 3).
    sampled = Work(tokens=3, scored_tokens=6, pairs=5 + 6 + 3)
    assert rollout_work(SOMETHING, prefill_tokens=10) == Work(tokens=10, pairs=23) + sampled
    # With half of the prompt tokens, half of the pairs.
    assert rollout_work(SOMETHING, prefill_tokens=5) == Work(tokens=5, pairs=11.5) + sampled
    assert rollout_work(NOTHING, prefill_tokens=0) == Work()


class OneOfTwoParts:
    """The other rank's engine, as a tensor-parallel rank sees it."""

    data_rank = 0

    def gather(self, value):
        return [value]

    def gather_parts(self, value):
        return [value, PromptTokens(total=30, cached=20, shareable=25)]


@pytest.mark.parametrize(
    ("read", "expected"),
    [((10, 4, 8), {"rollout/prefill_tokens": 16.0, "rollout/prompt_tokens": 40.0}), (None, None)],
)
def test_the_engines_of_tensor_parallel_ranks_add_up(read, expected):
    engine = ScriptedEngine(["x"])
    engine._version = 0
    engine.prompt_tokens = read and PromptTokens(total=0, cached=0, shareable=0)

    def rollout(tasks):
        engine.prompt_tokens = read and PromptTokens(total=read[0], cached=read[1], shareable=read[2])
        return [group(4, 3, 1)]

    roller = StepRoller(
        engine,
        rollout,
        objective=BoundObjective(NextTokenObjective(ContinuationPrompt(), PrefixMatchReward()), None),
        dynamic_sampling=DynamicSampling(from_step=None),
        pilot_size=None,
    )
    metrics = roller.roll_out(
        [TASK], lambda wanted: [], step=0, max_extra_tasks=0, ranks=OneOfTwoParts()
    ).metrics
    if expected is None:  # each completion's prompt, which all of these ranks know
        expected = {"rollout/prefill_tokens": 8.0}
    assert {name: metrics[name] for name in expected} == expected


def test_servers_are_those_of_the_rank_that_sees_fewest():
    class TwoRanks:
        def gather(self, row):
            return [row, [0.0, 3.0, 1.0]]  # no groups, three losses, one usable server

    assert server_metrics(None) == {}
    assert over_ranks(TwoRanks(), server_metrics((2, 0)), num_groups=4) == {
        "run/lost_servers": 3.0,
        "run/usable_servers": 1.0,
    }


def test_sent_weights_are_those_of_the_first_rank():
    class TwoRanks:
        def gather(self, row):
            return [row, [0.0, 0.0, 0.0, 0.0]]  # no groups, and nothing sent

    assert sent_metrics(None) == {}
    assert over_ranks(TwoRanks(), sent_metrics(SentWeights(70, 500, 0.02)), num_groups=4) == {
        "sync/sent_bytes": 70.0,
        "sync/full_bytes": 500.0,
        "sync/changed_frac": 0.02,
    }


# Two ranks with 1 and 3 groups, and the values 2 and 6.
REDUCED = {
    8.0: (
        *("rollout/live_groups", "rollout/replaced_groups", "rollout/dead_groups_kept"),
        *("rollout/dropped_groups", "rollout/tokens", "rollout/prefill_tokens", "rollout/prompt_tokens"),
        *("rollout/cached_prompt_tokens", "rollout/shareable_prompt_tokens", "answers/quoted"),
        *("answers/unreadable", "answers/timeouts", "answers/check_errors"),
        *("judge/asked", "judge/unreadable"),
    ),
    5.0: (
        *("reward/mean", "rollout/boxed_frac", "rollout/truncated_frac", "rollout/length_mean"),
        *("rollout/live_groups_frac", "rollout/all_wrong_frac", "rollout/all_right_frac"),
        *("rollout/distinct_predictions", "rollout/pilot_filled_frac", "rollout/staleness"),
    ),
    6.0: (
        *("rollout/length_max", "sync/logprob_diff_mean", "sync/logprob_diff_median"),
        *("sync/logprob_diff_p99", "sync/logprob_diff_max", "sync/logprob_outlier_frac"),
        *("sync/compared_tokens", "sync/closer_looks", "run/lost_servers", "time/between_steps_s"),
        *("time/sync_s", "time/rollout_s", "time/generation_s", "time/logprob_check_s"),
        *("time/old_logprobs_s", "time/pack_s", "time/forward_backward_s", "time/optimizer_s"),
        *("time/log_s", "time/train_s", "time/step_s"),
    ),
    2.0: ("run/usable_servers",),
}


class OneAndThreeGroups:
    def gather(self, row):
        return [row, [3.0, *[6.0] * (len(row) - 1)]]


@pytest.mark.parametrize(("expected", "names"), REDUCED.items())
def test_each_metric_is_reduced_as_it_is_registered(expected, names):
    reduced = over_ranks(OneAndThreeGroups(), dict.fromkeys(names, 2.0), num_groups=1)
    assert reduced == dict.fromkeys(names, expected)


def test_a_metric_that_is_not_registered_is_not_reduced():
    with pytest.raises(ValueError, match="rollout/luck_max: no such metric is registered"):
        over_ranks(OneAndThreeGroups(), {"rollout/tokens": 1.0, "rollout/luck_max": 1.0}, num_groups=1)


@pytest.mark.long
def test_a_run_with_more_ranks_than_tasks(make_run, tmp_path):
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo", timeout=timedelta(seconds=60))
    trainer, module, data = make_run(
        2,
        callbacks=[StepLog()],
        run_dir=tmp_path / "two",
        devices=2,
        strategy=strategy,
        data_options={"tasks_per_step": 1, "positions_per_document": 1},
    )
    module.make_optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)  # travels to the other process
    trainer.fit(module, data)
    lines = [json.loads(line) for line in (tmp_path / "two" / "steps.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(0 < line["rollout/length_mean"] <= 32 and line["rollout/tokens"] > 0 for line in lines)
