"""Selection by the policy's chance: which tasks are kept, how many are drawn, and on which rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rank_threads import Ranks

from rpt_lightning.data.modules.stream import rank_share
from rpt_lightning.rollout.dynamic_sampling import fill_batch
from rpt_lightning.rollout.selection import Chance, SelectionCounts, TaskSelector
from rpt_lightning.rollout.settings import Selection
from rpt_lightning.types import Completion, RolloutGroup, Task, TokenTask

BAND = Selection(min_true_prob=0.05, max_true_prob=0.8)


def task(number: int) -> TokenTask:
    return TokenTask(
        task_id=f"d:{number}", doc_id="d", position=number, context_ids=(1,), continuation_ids=(2,),
        continuation=(b"a",), entropy=1.0, true_prob=0.5, true_rank=0, answerable=True,
    )  # fmt: skip


class World:
    """An endless stream of tasks with these chances, over and over, that records what was scored."""

    def __init__(self, probs: Sequence[float]) -> None:
        self.probs, self.next_number, self.scored = probs, 0, []

    def draw(self, wanted: Sequence[int]) -> list[TokenTask]:
        (num,) = wanted  # there is one rank
        self.next_number += num
        return [task(number) for number in range(self.next_number - num, self.next_number)]

    def prob(self, one: Task) -> float:
        return self.probs[one.position % len(self.probs)]

    def score(self, tasks: Sequence[Task]) -> list[Chance]:
        self.scored.append([one.position for one in tasks])
        return [Chance(logprob=math.log(self.prob(one)), entropy=1.0) for one in tasks]


def selected(selector: TaskSelector, world: World, num: int) -> list[int]:
    return [one.position for one in selector.select(world.draw([num]), world.draw)]


def test_tasks_outside_of_the_band_give_their_places_to_further_ones() -> None:
    world = World([0.9, 0.1, 0.01, 0.5, 0.04, 0.3, 0.06, 0.85])
    selector = TaskSelector(BAND, world.score)
    # The places hold 0, 1, 2. Tasks 0 and 2 are out, so 3 and 4 come. 4 is out, so 5 comes.
    assert selected(selector, world, 3) == [3, 1, 5]
    assert world.scored == [[0, 1, 2], [3, 4], [5]]
    assert selector.take_counts() == SelectionCounts(drawn=6, in_band=3, kept=3)
    # The next step continues behind them.
    assert selected(selector, world, 1) == [6]
    assert world.next_number == 7
    assert selector.take_counts() == SelectionCounts(drawn=1, in_band=1, kept=1)
    assert selector.take_counts() == SelectionCounts()


def test_at_the_limit_the_last_task_drawn_is_kept() -> None:
    world = World([0.9, 0.9, 0.9, 0.9, 0.5, 0.9])
    selector = TaskSelector(Selection(max_true_prob=0.8, max_draws=2), world.score)
    # Two tasks may be drawn for two places: 2 and 3. Task 4 would have been right.
    assert selected(selector, world, 2) == [2, 3]
    assert world.next_number == 4
    assert selector.take_counts() == SelectionCounts(drawn=4, in_band=0, kept=2, kept_outside=2)


def test_further_tasks_of_dynamic_sampling_are_selected_too() -> None:
    world = World([0.5, 0.5, 0.9, 0.5, 0.01, 0.5])
    selector = TaskSelector(BAND, world.score)
    completion = Completion(
        token_ids=(1,), text_bytes=b"x", rollout_logprobs=(-1.0,), policy_version=0, finish_reason="stop"
    )

    def rollout(tasks: Sequence[Task]) -> list[RolloutGroup]:
        return [
            RolloutGroup(
                task=one,
                prompt_ids=(1,),
                completions=(completion,) * 2,
                predictions=(b"a", None),
                rewards=(float(one.position >= 5), 0.0),  # the groups of the first tasks have no gradient
            )
            for one in tasks
        ]

    first = selector.select(world.draw([2]), world.draw)
    assert [one.position for one in first] == [0, 1]
    filled = fill_batch(rollout, selector.selecting(world.draw), first, max_extra_tasks=100)
    # Tasks 2 and 3 come for 0 and 1. The policy is sure of 2, so 4 is drawn, which is hopeless, and then 5.
    # Group 3 has no gradient either. Task 6 takes its place, which is like task 0.
    assert [group.task.position for group in filled.groups] == [5, 6]
    assert [group.task.position for group in filled.replaced] == [0, 1, 3]
    assert world.scored == [[0, 1], [2, 3], [4], [5], [6]]
    assert selector.take_counts() == SelectionCounts(drawn=7, in_band=5, kept=5)


PROBS = st.lists(st.sampled_from([0.001, 0.05, 0.3, 0.8, 0.99]), min_size=1, max_size=30)


@given(PROBS, st.integers(1, 12), st.integers(2, 5))
def test_no_task_of_the_band_is_lost_and_none_outside_is_kept_before_the_limit(
    probs: list[float], size: int, max_draws: int
) -> None:
    world = World(probs)
    settings = Selection(min_true_prob=0.05, max_true_prob=0.8, max_draws=max_draws)
    selector = TaskSelector(settings, world.score)
    kept = selected(selector, world, size)
    scored = [number for numbers in world.scored for number in numbers]
    assert scored == list(range(world.next_number))  # each task that left the stream is scored once
    inside = {number for number in scored if 0.05 <= world.prob(task(number)) <= 0.8}
    counts = selector.take_counts()
    assert len(set(kept)) == len(kept) == counts.kept == size
    assert inside <= set(kept)
    assert (counts.drawn, counts.in_band) == (len(scored), len(inside))
    assert counts.kept_outside == size - len(inside)
    assert counts.drawn <= size * max_draws
    assert counts.kept_outside == 0 or counts.drawn == size * max_draws


@pytest.mark.parametrize("max_draws", [2, 3, 50])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_same_tasks_are_selected_on_any_number_of_ranks(num_ranks: int, max_draws: int) -> None:
    probs = [0.5 if number % 5 == 3 else 0.9 for number in range(200)]
    settings = Selection(max_true_prob=0.8, max_draws=max_draws)
    alone = World(probs)
    expected = selected(TaskSelector(settings, alone.score), alone, 9)

    # taken: tasks taken from the stream that all ranks share.
    ranks, kept, counts, taken = Ranks(num_ranks), {}, {}, [9] * num_ranks

    def run(rank: int) -> None:
        def draw(wanted: Sequence[int]) -> list[TokenTask]:
            first = taken[rank] + sum(wanted[:rank])
            taken[rank] += sum(wanted)
            return [task(number) for number in range(first, first + wanted[rank])]

        def score(tasks: Sequence[Task]) -> list[Chance]:
            ranks.all_gather(rank, len(tasks))  # the policy's weights may be sharded, so it is a collective
            return World(probs).score(tasks)

        own = [task(number) for number in rank_share(range(9), rank=rank, num_ranks=num_ranks)]
        selector = TaskSelector(settings, score)
        kept[rank] = selector.select(
            own, draw, over_ranks=lambda number: (ranks.all_gather(rank, number), rank)
        )
        counts[rank] = selector.take_counts()

    ranks.run(run)
    assert [one.position for rank in range(num_ranks) for one in kept[rank]] == expected
    assert set(taken) == {alone.next_number}
    assert sum(count.drawn for count in counts.values()) == alone.next_number
