from __future__ import annotations

import dataclasses

import pytest

from rpt_lightning.metrics.rollout_stats import rollout_statistics
from rpt_lightning.types import Completion, RolloutGroup, TokenTask


def group_of(
    rewards: tuple[float, ...],
    predictions: tuple[bytes | None, ...],
    lengths: tuple[int, ...],
    truncated: int = 0,
) -> RolloutGroup:
    task = TokenTask(
        task_id="d:1", doc_id="d", position=1, context_ids=(1,), continuation_ids=(2,), continuation=(b"a",),
        entropy=1, true_prob=0.5, true_rank=0, answerable=True
    )  # fmt: skip
    completions = tuple(
        Completion(
            token_ids=(7,) * length,
            text_bytes=b"",
            rollout_logprobs=(0.0,) * length,
            policy_version=0,
            finish_reason="length" if i < truncated else "stop",
        )
        for i, length in enumerate(lengths)
    )
    return RolloutGroup(
        task=task, prompt_ids=(1,), completions=completions, predictions=predictions, rewards=rewards
    )


def test_hand_counted() -> None:
    groups = [
        group_of((1.0, 0.0, 0.0), (b"a", b"b", None), (1, 2, 3), truncated=1),
        group_of((0.0, 0.0, 0.0), (None, None, None), (4, 4, 4), truncated=3),
        group_of((1.0, 1.0, 1.0), (b"a", b"a", b"a"), (1, 1, 1)),
        group_of((0.5, 0.5, 0.5), (b"a", b"b", b""), (2, 2, 10)),
    ]
    assert rollout_statistics(groups) == pytest.approx(
        {
            "reward/mean": 5.5 / 12,
            "rollout/boxed_frac": 8 / 12,
            "rollout/truncated_frac": 4 / 12,
            "rollout/length_mean": 35 / 12,
            "rollout/length_max": 10.0,
            "rollout/live_groups": 1.0,
            "rollout/live_groups_frac": 1 / 4,
            "rollout/all_wrong_frac": 1 / 4,
            "rollout/all_right_frac": 2 / 4,
            "rollout/distinct_predictions": (2 + 0 + 1 + 3) / 4,
        }
    )


def test_with_pilots_means_are_over_what_every_group_has() -> None:
    groups = [
        group_of((1.0, 0.0, 1.0, 1.0), (b"a", None, b"a", b"c"), (1, 3, 8, 9)),
        group_of((0.0, 0.0), (b"b", None), (2, 2), truncated=1),
    ]
    statistics = rollout_statistics(groups, pilot_size=2)
    expected = {
        "reward/mean": 1 / 4,
        "rollout/boxed_frac": 2 / 4,
        "rollout/truncated_frac": 1 / 4,
        "rollout/length_mean": 8 / 4,
    }
    assert {name: statistics[name] for name in expected} == pytest.approx(expected)
    assert statistics["rollout/length_max"] == 9.0
    assert statistics["rollout/live_groups"] == 1.0


def test_masked_completions_make_no_group_live() -> None:
    """The first completion of each group is truncated.

    The trained rewards of the groups are 1; 0; 1 and 0; and none.
    """
    groups = [
        group_of((0.0, 1.0, 1.0), (None, b"a", b"a"), (3, 1, 1), truncated=1),
        group_of((0.5, 0.0, 0.0), (None, b"a", b"a"), (3, 1, 1), truncated=1),
        group_of((0.0, 1.0, 0.0), (None, b"a", b"b"), (3, 1, 1), truncated=1),
        group_of((0.0, 0.5), (None, None), (3, 3), truncated=2),
    ]
    names = ("rollout/live_groups_frac", "rollout/all_right_frac", "rollout/all_wrong_frac")
    for masks_truncated, shares in ((False, (1, 0, 0)), (True, (1 / 4, 1 / 4, 2 / 4))):
        statistics = rollout_statistics(
            [dataclasses.replace(group, masks_truncated=masks_truncated) for group in groups]
        )
        assert tuple(statistics[name] for name in names) == pytest.approx(shares)
        assert statistics["reward/mean"] == pytest.approx(4 / 11)  # 2 + 0.5 + 1 + 0.5 of 11 completions


def test_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="no groups"):
        rollout_statistics([])
