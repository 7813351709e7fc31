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
from rpt_lightning.rollout.position_kinds import KindShares, kind_of, num_kinds
from rpt_lightning.rollout.seeds import task_uniform
from rpt_lightning.rollout.selection import Chance, SelectionCounts, TaskSelector
from rpt_lightning.rollout.settings import Selection
from rpt_lightning.types import Completion, RolloutGroup, Task, TokenTask

BAND = Selection(min_true_prob=0.05, max_true_prob=0.8)
KIND_OF_10, KIND_OF_30 = kind_of(0.1, 1.0), kind_of(0.3, 1.0)


def task(number: int) -> TokenTask:
    return TokenTask(
        task_id=f"d:{number}", doc_id="d", position=number, context_ids=(1,), continuation_ids=(2,),
        continuation=(b"a",), entropy=1.0, true_prob=0.5, true_rank=0, answerable=True,
    )  # fmt: skip


def group(of: Task, *, is_live: bool) -> RolloutGroup:
    completion = Completion(
        token_ids=(1,), text_bytes=b"x", rollout_logprobs=(-1.0,), policy_version=0, finish_reason="stop"
    )
    return RolloutGroup(
        task=of,
        prompt_ids=(1,),
        completions=(completion,) * 2,
        predictions=(b"a", None),
        rewards=(float(is_live), 0.0),
    )


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
    assert selector.take_counts() == SelectionCounts(drawn=6, in_band=3, accepted=3, kept=3)
    # The next step continues behind them.
    assert selected(selector, world, 1) == [6]
    assert world.next_number == 7
    assert selector.take_counts() == SelectionCounts(drawn=1, in_band=1, accepted=1, kept=1)
    assert selector.take_counts() == SelectionCounts()


def test_at_the_limit_the_last_task_drawn_is_kept() -> None:
    world = World([0.9, 0.9, 0.9, 0.9, 0.5, 0.9])
    selector = TaskSelector(Selection(max_true_prob=0.8, max_draws=2), world.score)
    # Two tasks may be drawn for two places: 2 and 3. Task 4 would have been right.
    assert selected(selector, world, 2) == [2, 3]
    assert world.next_number == 4
    assert selector.take_counts() == SelectionCounts(drawn=4, in_band=0, accepted=0, kept=2, kept_outside=2)


def test_further_tasks_of_dynamic_sampling_are_selected_too() -> None:
    world = World([0.5, 0.5, 0.9, 0.5, 0.01, 0.5])
    selector = TaskSelector(BAND, world.score)

    def rollout(tasks: Sequence[Task]) -> list[RolloutGroup]:
        return [group(one, is_live=one.position >= 5) for one in tasks]  # the first teach nothing

    first = selector.select(world.draw([2]), world.draw)
    assert [one.position for one in first] == [0, 1]
    filled = fill_batch(rollout, selector.selecting(world.draw), first, max_extra_tasks=100)
    # Tasks 2 and 3 come for 0 and 1. The policy is sure of 2, so 4 is drawn, which is hopeless, and then 5.
    # Group 3 has no gradient either. Task 6 takes its place, which is like task 0.
    assert [group.task.position for group in filled.groups] == [5, 6]
    assert [group.task.position for group in filled.replaced] == [0, 1, 3]
    assert world.scored == [[0, 1], [2, 3], [4], [5], [6]]
    assert selector.take_counts() == SelectionCounts(drawn=7, in_band=5, accepted=5, kept=5)


def test_a_kind_whose_groups_taught_nothing_is_mostly_left_out() -> None:
    """Tasks with a chance of 0.3 teach, those with 0.1 do not. The floor is 0.25."""
    world = World([0.3, 0.1])
    kinds = KindShares(floor=0.25, decay=0.5)
    selector = TaskSelector(Selection(by_kind=True), world.score, seed=3, kinds=kinds)
    first = selector.select(world.draw([20]), world.draw)
    assert [one.position for one in first] == list(range(20))  # nothing is known yet
    selector.learn([group(one, is_live=one.position % 2 == 0) for one in first])
    assert kinds.accept_prob(KIND_OF_10) == 1.0  # what a step saw counts from its end
    kinds.commit()
    # 10 of 10 groups of the better kind are live and none of 10 of the other: 0.5 overall.
    # (10 + 4 x 0.5) / 14 = 6/7, and (0 + 4 x 0.5) / 14 = 1/7. 1/7 of 6/7 is 1/6, below the floor.
    assert kinds.share(KIND_OF_30) == pytest.approx(6 / 7)
    assert kinds.share(KIND_OF_10) == pytest.approx(1 / 7)
    assert (kinds.accept_prob(KIND_OF_30), kinds.accept_prob(KIND_OF_10)) == (1.0, 0.25)
    selector.take_counts()
    kept = selected(selector, world, 200)
    counts = selector.take_counts()
    numbers = [number for round_ in world.scored[1:] for number in round_]
    good, poor = ({n for n in numbers if n % 2 == odd} for odd in (0, 1))
    assert good <= set(kept)
    taken = {n for n in poor if task_uniform(3, 0, f"d:{n}") < 0.25}
    assert set(kept) == good | taken
    assert 0.15 < len(taken) / len(poor) < 0.35
    assert (counts.in_band, counts.accepted) == (len(numbers), 200)


def test_what_teaches_is_counted_over_all_ranks() -> None:
    world = World([0.3, 0.1])
    kinds = KindShares(floor=0.1, decay=1.0)
    selector = TaskSelector(Selection(by_kind=True), world.score, kinds=kinds)
    own = selector.select(world.draw([4]), world.draw)

    def gather(counts: list[int]) -> list[list[int]]:
        other = [0] * len(counts)
        other[KIND_OF_10] = 1  # the other rank rolled out one group of this kind, and it has a gradient
        other[num_kinds() + KIND_OF_10] = 1
        return [counts, other]

    selector.learn([group(one, is_live=one.position == 0) for one in own], gather=gather)
    kinds.commit()
    assert (kinds.live[KIND_OF_30], kinds.total[KIND_OF_30]) == (1, 2)
    assert (kinds.live[KIND_OF_10], kinds.total[KIND_OF_10]) == (1, 3)
    assert (sum(kinds.live), sum(kinds.total)) == (2, 5)


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
    assert counts.accepted == counts.in_band
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
