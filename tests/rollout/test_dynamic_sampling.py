from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rank_threads import Ranks

from rpt_lightning.data.modules.stream import rank_share
from rpt_lightning.rollout.dynamic_sampling import fill_batch
from rpt_lightning.types import Completion, RolloutGroup, TokenTask

COMPLETION = Completion(
    token_ids=(1,), text_bytes=b"x", rollout_logprobs=(-1.0,), policy_version=0, finish_reason="stop"
)


def task(number: int) -> TokenTask:
    return TokenTask(
        task_id=f"d:{number}", doc_id="d", position=number, context_ids=(1,), continuation_ids=(2,),
        continuation=(b"a",), entropy=1.0, true_prob=0.5, true_rank=0, answerable=True,
    )  # fmt: skip


def group(of: TokenTask, live: bool) -> RolloutGroup:
    return RolloutGroup(
        task=of,
        prompt_ids=(1,),
        completions=(COMPLETION,) * 2,
        predictions=(b"a", None),
        rewards=(1.0, 0.0) if live else (0.0, 0.0),
    )


class World:
    """A stream of tasks, some with live groups, that records all calls."""

    def __init__(self, liveness: Sequence[bool]) -> None:
        self.liveness, self.next_number, self.calls = liveness, 0, []

    def draw(self, num: int) -> list[TokenTask]:
        first = self.next_number
        self.next_number = min(first + num, len(self.liveness))
        return [task(number) for number in range(first, self.next_number)]

    def draw_one(self, wanted: Sequence[int]) -> list[TokenTask]:
        (num,) = wanted  # there is one rank
        return self.draw(num)

    def rollout(self, tasks: Sequence[TokenTask]) -> list[RolloutGroup]:
        self.calls.append([one.position for one in tasks])
        return [group(one, self.liveness[one.position]) for one in tasks]


def test_dead_groups_are_replaced_in_their_places() -> None:
    world = World([True, False, False, False, True, True])
    filled = fill_batch(world.rollout, world.draw_one, world.draw(3), max_extra_tasks=10)
    # Round 1 draws 3 and 4 for the places of 1 and 2. Task 3 gives equal rewards again, so round 2 draws 5
    # for it.
    assert world.calls == [[0, 1, 2], [3, 4], [5]]
    assert [one.task.position for one in filled.groups] == [0, 5, 4]
    assert [one.task.position for one in filled.replaced] == [1, 2, 3]
    assert (filled.num_rounds, filled.num_dead) == (2, 0)


def test_at_the_limit_the_batch_keeps_its_size_with_dead_groups() -> None:
    world = World([False] * 10)
    filled = fill_batch(world.rollout, world.draw_one, world.draw(2), max_extra_tasks=3)
    assert world.calls == [[0, 1], [2, 3], [4]]
    assert [one.task.position for one in filled.groups] == [4, 3]
    assert filled.num_dead == 2


def test_a_limit_of_zero_leaves_the_batch_as_it_is() -> None:
    world = World([False, True])
    filled = fill_batch(world.rollout, world.draw_one, world.draw(2), max_extra_tasks=0)
    assert [one.task.position for one in filled.groups] == [0, 1]
    assert (filled.replaced, filled.num_rounds, world.next_number) == ((), 0, 2)


def test_a_group_that_is_live_by_masked_completions_alone_is_dead() -> None:
    cut = dataclasses.replace(COMPLETION, finish_reason="length")
    by_cut = dataclasses.replace(
        group(task(0), True),
        completions=(COMPLETION, COMPLETION, cut),
        predictions=(b"a", b"a", None),
        rewards=(1.0, 1.0, 0.0),
    )
    masked = dataclasses.replace(by_cut, masks_truncated=True)
    assert (by_cut.is_live, masked.is_live) == (True, False)
    assert masked.trained == [(COMPLETION, 1.0), (COMPLETION, 1.0)]
    assert not dataclasses.replace(masked, completions=(cut,) * 3).is_live  # no completion is left
    assert dataclasses.replace(masked, rewards=(1.0, 0.0, 0.0)).is_live
    groups = {0: masked, 1: group(task(1), True)}

    def rollout(tasks: Sequence[TokenTask]) -> list[RolloutGroup]:
        return [groups[one.position] for one in tasks]

    filled = fill_batch(rollout, lambda wanted: [task(1)], [task(0)], max_extra_tasks=1)
    assert (filled.groups, filled.replaced, filled.num_dead) == ((groups[1],), (masked,), 0)
    assert fill_batch(rollout, lambda wanted: [], [task(0)], max_extra_tasks=0).num_dead == 1


def test_ranks_with_different_numbers_of_dead_groups_draw_together() -> None:
    ranks, drawn, rolled_out, filled = Ranks(2), ([], []), ([], []), {}
    # Rank 0 needs nothing, and rank 1 needs three rounds.
    liveness = ([True, True, True], [False, False, False, True, False, True])

    def run(rank: int) -> None:
        world = World(liveness[rank])

        def draw(wanted: Sequence[int]) -> list[TokenTask]:
            drawn[rank].append(list(wanted))
            return world.draw(wanted[rank])

        def rollout(tasks: Sequence[TokenTask]) -> list[RolloutGroup]:
            # A collective, because a reward may query the policy, whose weights may be sharded.
            rolled_out[rank].append(ranks.all_gather(rank, len(tasks))[rank])
            return world.rollout(tasks)

        filled[rank] = fill_batch(
            rollout,
            draw,
            world.draw(2),
            max_extra_tasks=10,
            over_ranks=lambda number: (ranks.all_gather(rank, number), rank),
        )

    ranks.run(run)
    assert drawn[0] == drawn[1] == [[0, 2], [0, 1], [0, 1]]
    assert rolled_out == ([2, 0, 0, 0], [2, 2, 1, 1])
    assert (filled[0].num_rounds, filled[1].num_rounds) == (0, 3)
    assert (filled[0].num_dead, filled[1].num_dead) == (0, 0)


@pytest.mark.parametrize("max_extra_tasks", [0, 5, 7, 100])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_step_is_filled_alike_on_any_number_of_ranks(num_ranks: int, max_extra_tasks: int) -> None:
    liveness = [number % 5 == 3 for number in range(200)]
    alone = World(liveness)
    expected = fill_batch(alone.rollout, alone.draw_one, alone.draw(8), max_extra_tasks=max_extra_tasks)

    # taken: tasks taken from the stream that all ranks share.
    ranks, filled, taken = Ranks(num_ranks), {}, [8] * num_ranks

    def run(rank: int) -> None:
        def draw(wanted: Sequence[int]) -> list[TokenTask]:
            first = taken[rank] + sum(wanted[:rank])
            taken[rank] += sum(wanted)
            return [task(number) for number in range(first, first + wanted[rank])]

        own = [task(number) for number in rank_share(range(8), rank=rank, num_ranks=num_ranks)]
        rollout = World(liveness).rollout
        options = {
            "max_extra_tasks": max_extra_tasks,
            "over_ranks": lambda number: (ranks.all_gather(rank, number), rank),
        }
        filled[rank] = fill_batch(rollout, draw, own, **options)

    ranks.run(run)
    assert [group for rank in range(num_ranks) for group in filled[rank].groups] == list(expected.groups)
    replaced = [group.task.position for rank in range(num_ranks) for group in filled[rank].replaced]
    assert sorted(replaced) == sorted(group.task.position for group in expected.replaced)
    assert set(taken) == {alone.next_number}


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 30))
def test_no_task_is_lost_or_counted_twice(liveness: list[bool], size: int, max_extra_tasks: int) -> None:
    world = World(liveness)
    tasks = world.draw(size)
    filled = fill_batch(world.rollout, world.draw_one, tasks, max_extra_tasks=max_extra_tasks)
    counted = Counter(one.task.position for one in (*filled.groups, *filled.replaced))
    assert counted == Counter(range(world.next_number))  # every task that left the stream, exactly once
    assert len(filled.groups) == len(tasks)
    assert len(filled.replaced) <= max_extra_tasks
    assert not any(one.is_live for one in filled.replaced)  # a live group never gives up its place
    # It stops early only if every group is live, at the limit, or at the end of the stream.
    assert (
        filled.num_dead == 0 or len(filled.replaced) == max_extra_tasks or world.next_number == len(liveness)
    )
