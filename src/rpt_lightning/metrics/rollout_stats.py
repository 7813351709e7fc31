"""Statistics of a step's rollouts.

They show whether the policy answers in the requested form, and whether its groups can teach anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rpt_lightning.types import RolloutGroup

STATISTICS = (
    "reward/mean",
    "rollout/boxed_frac",
    "rollout/truncated_frac",
    "rollout/length_mean",
    "rollout/length_max",
    "rollout/live_groups",
    "rollout/live_groups_frac",
    "rollout/all_wrong_frac",
    "rollout/all_right_frac",
    "rollout/distinct_predictions",
)


def rollout_statistics(groups: Sequence[RolloutGroup], *, pilot_size: int | None = None) -> dict[str, float]:
    """Compute the statistics of a step's groups.

    ``reward/mean``, ``rollout/boxed_frac``, ``truncated_frac`` and ``length_mean`` are means over
    completions. The others are over groups. With pilots, the means use only the first ``pilot_size``
    completions of each group. The rewards decided which groups have more completions, so a mean over all of
    them would say little about the policy.

    A group is live if its rewards differ. It is all right if its rewards are equal and positive, and all
    wrong if every reward is 0. Rewards of masked completions do not count in any of the three
    (`RolloutGroup.trained`), and a group that has only masked completions is all wrong.
    ``rollout/distinct_predictions`` is the mean number of different predictions in a group, without missing
    ones. Lengths are in tokens.

    Raises ValueError if there are no groups.
    """
    if not groups:
        raise ValueError("rollout_statistics got no groups: a step rolls out at least one task")
    completions = [completion for group in groups for completion in group.completions[:pilot_size]]
    num_live = sum(group.is_live for group in groups)
    num_wrong = sum(not any(reward for _, reward in group.trained) for group in groups)
    return {
        "reward/mean": fmean(reward for group in groups for reward in group.rewards[:pilot_size]),
        "rollout/boxed_frac": fmean(
            prediction is not None for group in groups for prediction in group.predictions[:pilot_size]
        ),
        "rollout/truncated_frac": fmean(completion.is_truncated for completion in completions),
        "rollout/length_mean": fmean(len(completion.token_ids) for completion in completions),
        "rollout/length_max": float(
            max(len(completion.token_ids) for group in groups for completion in group.completions)
        ),
        "rollout/live_groups": float(num_live),
        "rollout/live_groups_frac": num_live / len(groups),
        "rollout/all_wrong_frac": num_wrong / len(groups),
        "rollout/all_right_frac": (len(groups) - num_live - num_wrong) / len(groups),
        "rollout/distinct_predictions": fmean(len(set(group.predictions) - {None}) for group in groups),
    }
