"""Cuts a batch of rollouts into mini-batches, one for each optimizer step on the batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rpt_lightning.data.modules.stream import rank_share
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.types import RolloutGroup


def mini_batches_of(
    groups: Sequence[RolloutGroup], number: int, ranks: Ranks
) -> list[Sequence[RolloutGroup]]:
    """This rank's share of each of ``number`` mini-batches, given its groups. A collective if ``number`` > 1.

    Mini-batches are contiguous parts, of nearly equal size, of the concatenated groups of all ranks. So the
    number of ranks does not change which group is in which mini-batch. Each mini-batch is then divided among
    the ranks again. Otherwise a few ranks would do all the work of a mini-batch while the others wait.
    """
    if number == 1:
        return [groups]
    step = [group for part in ranks.gather(groups) for group in part]
    bounds = [round(i * len(step) / number) for i in range(number + 1)]
    return [
        rank_share(step[start:end], rank=ranks.data_rank, num_ranks=ranks.num_data)
        for start, end in itertools.pairwise(bounds)
    ]
