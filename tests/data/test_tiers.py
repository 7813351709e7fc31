from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.data.modules.stream import Place, ShuffledOrder, TaskStream
from rpt_lightning.data.modules.tiers import TieredOrder, Tiers

# 3 documents in 2 chunks; tiers by the bounds 1.0 and 1.5 are 0 (easy), 1 and 2 (hard).
ENTROPY = [
    np.array([0.5, 1.2, 2.0, 0.9], np.float32),
    np.array([1.5], np.float32),  # does not exceed 1.5
    np.array([3.0, 1.0, 1.6, 0.7, 0.6], np.float32),
]
TIERS = Tiers(bounds=(1.0, 1.5), first=(0.6, 0.3, 0.1), last=(0.1, 0.3, 0.6), steps=10)


def order(tiers=TIERS, *, entropy=ENTROPY, items_per_step=1, seed=0, bundle_size=1, chunk_sizes=(2, 1)):
    return TieredOrder(
        entropy, list(chunk_sizes), tiers, bundle_size=bundle_size, seed=seed, items_per_step=items_per_step,
        where="tasks/here",
    )  # fmt: skip


def stream(tiers=TIERS, **options):
    return TaskStream(order(tiers, **options), corpus="text")


def steps(stream, sizes):
    taken = []
    for num in sizes:
        stream.begin_step()
        taken.append(stream.next(num))
    return taken


def tier_of(pair, entropy=ENTROPY):
    document, k = pair
    return int(TIERS.of(entropy[document][k : k + 1])[0])


def test_probabilities_by_hand():
    # Of 20 steps: p1 until step 6, p2 from step 14 on, and a step of 1/8 of the way in between.
    tiers = Tiers(bounds=(1.0, 1.5), first=(0.8, 0.2, 0.0), last=(0.0, 0.2, 0.8), steps=20)
    for step, expected in [
        (0, (0.8, 0.2, 0.0)),
        (6, (0.8, 0.2, 0.0)),
        (7, (0.7, 0.2, 0.1)),
        (10, (0.4, 0.2, 0.4)),
        (13, (0.1, 0.2, 0.7)),
        (14, (0.0, 0.2, 0.8)),
        (20, (0.0, 0.2, 0.8)),
        (100, (0.0, 0.2, 0.8)),
    ]:
        assert tiers.probabilities(step) == pytest.approx(expected, abs=1e-12), step


@given(st.integers(1, 60), st.integers(0, 80), st.floats(0, 1), st.floats(0, 1))
def test_probabilities_sum_to_1(num_steps, step, first, last):
    tiers = Tiers(bounds=(1.0,), first=(first, 1 - first), last=(last, 1 - last), steps=num_steps)
    shares = tiers.probabilities(step)
    assert sum(shares) == pytest.approx(1)
    assert min(first, last) - 1e-12 <= shares[0] <= max(first, last) + 1e-12


def test_the_tier_of_a_position():
    assert [TIERS.of(values).tolist() for values in ENTROPY] == [[0, 1, 2, 0], [1], [2, 0, 2, 0, 0]]


def test_each_tier_is_gone_through_epoch_by_epoch():
    """Whatever is drawn, a tier's tasks come equally often, up to one, and never two epochs mixed."""
    own = stream()
    taken = list(itertools.chain.from_iterable(steps(own, [7] * 40)))
    for tier, size in enumerate([5, 2, 3]):
        of_tier = [pair for pair in taken if tier_of(pair) == tier]
        for start in range(0, len(of_tier) - size + 1, size):
            epoch = of_tier[start : start + size]
            assert len(set(epoch)) == size, (tier, epoch)
    assert own.place.taken == tuple(Counter(map(tier_of, taken))[tier] for tier in range(3))
    assert own.place.index == len(taken) == 280


def test_shares_follow_the_schedule():
    num = 4000
    drawn = steps(stream(), [num] * 11)
    for step, pairs in enumerate(drawn):
        counts = Counter(map(tier_of, pairs))
        for tier, share in enumerate(TIERS.probabilities(step)):
            deviation = (share * (1 - share) / num) ** 0.5
            assert abs(counts[tier] / num - share) < 4.5 * deviation, (step, tier)


def test_a_tier_of_probability_0_is_never_drawn():
    tiers = Tiers(bounds=(1.0, 1.5), first=(1.0, 0.0, 0.0), last=(0.0, 0.0, 1.0), steps=10)
    drawn = steps(stream(tiers), [50] * 10)
    assert {tier_of(pair) for pairs in drawn[:4] for pair in pairs} == {0}
    assert {tier_of(pair) for pairs in drawn[7:] for pair in pairs} == {2}
    assert {tier_of(pair) for pairs in drawn for pair in pairs} == {0, 2}


def test_what_is_drawn_within_a_step_belongs_to_it():
    """Dynamic sampling draws after the step's own tasks."""
    tiers = Tiers(bounds=(1.0, 1.5), first=(1.0, 0.0, 0.0), last=(0.0, 0.0, 1.0), steps=1)
    own = stream(tiers)
    for step in range(3):
        own.begin_step()
        assert {tier_of(pair) for pair in own.next(4) + own.next(3)} == {0 if step == 0 else 2}


@given(
    st.lists(st.integers(0, 6), max_size=6), st.lists(st.integers(0, 6), max_size=6), st.integers(0, 3),
    st.integers(1, 3),
)  # fmt: skip
def test_a_resumed_order_is_the_uninterrupted_one(first, second, seed, bundle_size):
    whole = stream(seed=seed, bundle_size=bundle_size)
    expected = steps(whole, first + second)
    before = stream(seed=seed, bundle_size=bundle_size)
    taken = steps(before, first)
    after = stream(seed=seed, bundle_size=bundle_size)
    after.load_state_dict(before.state_dict())
    assert after.place == before.place
    assert taken + steps(after, second) == expected
    assert after.place == whole.place


def test_seeds_differ():
    assert steps(stream(seed=0), [20]) != steps(stream(seed=1), [20])


def test_positions_of_a_document_follow_each_other_within_a_tier():
    entropy = [np.full(4, 0.5 if k % 2 else 2.0, np.float32) for k in range(6)]
    tiers = Tiers(bounds=(1.0, 1.5), first=(0.5, 0.0, 0.5), last=(0.5, 0.0, 0.5), steps=1)
    drawn = steps(stream(tiers, entropy=entropy, bundle_size=4, chunk_sizes=(6,)), [24])[0]
    for tier in (0, 2):
        documents = [document for document, _ in drawn if tier_of((document, 0), entropy) == tier][:12]
        assert all(len(set(documents[start : start + 4])) == 1 for start in range(0, len(documents) - 3, 4))


def test_a_place_of_another_order_is_refused():
    tiered, plain = stream(), TaskStream(
        ShuffledOrder(np.array([4, 1, 5], np.int32), [2, 1], bundle_size=1, seed=0), corpus="text"
    )  # fmt: skip
    assert plain.state_dict()["made_with"].keys() == tiered.state_dict()["made_with"].keys() - {"tiers"}
    with pytest.raises(ValueError, match=r"belongs to tiers none, and this run has \[1.0, 1.5\]"):
        tiered.load_state_dict(plain.state_dict())
    with pytest.raises(
        ValueError, match=r"belongs to tiers \[1.0, 1.5\].* over 10 steps, and this run has none"
    ):
        plain.load_state_dict(tiered.state_dict())
    other = Tiers(bounds=(1.0, 1.5), first=(0.6, 0.3, 0.1), last=(0.1, 0.3, 0.6), steps=11)
    with pytest.raises(ValueError, match=r"over 10 steps, and this run has .* over 11 steps"):
        stream(other).load_state_dict(tiered.state_dict())
    assert plain.place == Place(0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": (1.0,)}, "bounds is not set"),
        ({"steps": 5}, "bounds is not set"),
        ({"bounds": (1.5, 1.0), "first": (1, 0, 0), "last": (1, 0, 0), "steps": 5}, "ascending"),
        ({"bounds": (1.0, 1.0), "first": (1, 0, 0), "last": (1, 0, 0), "steps": 5}, "ascending"),
        ({"bounds": (1.0,), "first": (1.0,), "last": (0, 1), "steps": 5}, "first .*2 tiers"),
        ({"bounds": (1.0,), "first": (1, 0), "last": (0.5, 0.4), "steps": 5}, "last .*sum to 1"),
        ({"bounds": (1.0,), "first": (1.5, -0.5), "last": (1, 0), "steps": 5}, "first .*sum to 1"),
        ({"bounds": (1.0,), "first": (float("nan"), 1), "last": (1, 0), "steps": 5}, "first"),
        ({"bounds": (1.0,), "first": (1, 0), "last": (0, 1)}, "steps, which is not set"),
        ({"bounds": (1.0,), "first": (1, 0), "last": (0, 1), "steps": 0}, "steps=0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Tiers(**settings)


def test_a_tier_without_tasks():
    with pytest.raises(ValueError, match=r"tier 3 of 3 \(entropy above 9.0 nats\) has no task in tasks/here"):
        order(Tiers(bounds=(1.0, 9.0), first=(0.9, 0.1, 0.0), last=(0.1, 0.1, 0.8), steps=10))
    # One that is never drawn may be empty.
    order(Tiers(bounds=(1.0, 9.0), first=(0.9, 0.1, 0.0), last=(0.1, 0.9, 0.0), steps=10))


def test_a_tier_with_too_few_tasks_for_a_step():
    with pytest.raises(ValueError, match=r"tasks_per_step 6: tier 3 of 3 .* only 3 tasks .* about 4 of it"):
        order(items_per_step=6)
    order(items_per_step=5)  # 3 of 5
