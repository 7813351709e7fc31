from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.data.modules.stream import WINDOW_CHUNKS, Place, ShuffledOrder, TaskStream, rank_share

Layout = tuple[list[int], list[int], int, int]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    chunks = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=20))
    return (
        [count for chunk in chunks for count in chunk],
        [len(chunk) for chunk in chunks],
        draw(st.integers(1, 4)),
        draw(st.integers(0, 3)),
    )


def make(layout: Layout) -> TaskStream:
    num_items, chunk_sizes, bundle_size, seed = layout
    return TaskStream(
        ShuffledOrder(np.array(num_items, np.int32), chunk_sizes, bundle_size=bundle_size, seed=seed),
        corpus="text",
    )


@given(layouts(), st.integers(0, 3))
def test_an_epoch_is_every_position_once(layout: Layout, epoch: int) -> None:
    order = make(layout).order
    pairs = [order[Place(epoch, index)] for index in range(order.items_per_epoch)]
    assert Counter(pairs) == Counter(
        (document, k) for document, count in enumerate(layout[0]) for k in range(count)
    )


def bundle_by_bundle(layout: Layout, epoch: int) -> list[tuple[int, int]]:
    """Compute the order of an epoch as it was first written, with one list of pairs per bundle.

    Checkpoints hold places in this order, so it may never change.
    """
    num_items, chunk_sizes, bundle_size, seed = layout
    bounds = [0, *itertools.accumulate(chunk_sizes)]
    chunks = np.random.default_rng([seed, epoch]).permutation(len(chunk_sizes)).tolist()
    order = []
    for window, start in enumerate(range(0, len(chunks), WINDOW_CHUNKS)):
        rng = np.random.default_rng([seed, epoch, window + 1])
        bundles = []
        for chunk in chunks[start : start + WINDOW_CHUNKS]:
            for document in range(bounds[chunk], bounds[chunk + 1]):
                pairs = [(document, item) for item in rng.permutation(num_items[document]).tolist()]
                bundles += [pairs[first : first + bundle_size] for first in range(0, len(pairs), bundle_size)]
        order += [pair for index in rng.permutation(len(bundles)).tolist() for pair in bundles[index]]
    return order


@given(layouts(), st.integers(0, 3))
def test_the_order_is_the_one_that_checkpoints_were_made_in(layout: Layout, epoch: int) -> None:
    order = make(layout).order
    assert [order[Place(epoch, index)] for index in range(order.items_per_epoch)] == bundle_by_bundle(
        layout, epoch
    )


@given(layouts(), st.lists(st.integers(0, 7), max_size=8), st.lists(st.integers(0, 7), max_size=8))
def test_the_order_does_not_depend_on_how_it_is_taken(
    layout: Layout, first: list[int], second: list[int]
) -> None:
    """Steps and draws of any size, with a stop and a resumption between them, give the same sequence."""
    plain = make(layout).next(sum(first) + sum(second))
    before = make(layout)
    taken = [pair for num in first for pair in before.next(num)]
    after = make(layout)
    after.load_state_dict(before.state_dict())
    taken += [pair for num in second for pair in after.next(num)]
    assert taken == plain


@given(layouts())
def test_random_access_equals_reading_in_order(layout: Layout) -> None:
    order = make(layout).order
    keys = [Place(epoch, index) for epoch in range(2) for index in range(order.items_per_epoch)]
    in_order = {key: order[key] for key in keys}
    rng = np.random.default_rng(0)
    shuffled = [keys[index] for index in rng.permutation(len(keys))]
    assert all(order[key] == in_order[key] for key in shuffled)


@given(layouts())
def test_positions_of_a_document_come_side_by_side(layout: Layout) -> None:
    order = make(layout).order
    documents = [order[Place(0, index)][0] for index in range(order.items_per_epoch)]
    runs = 1 + sum(left != right for left, right in itertools.pairwise(documents))
    assert runs <= sum(-(-count // order.bundle_size) for count in layout[0])


def test_bundles_have_the_asked_size() -> None:
    order = make(([6, 6, 6, 6], [4], 3, 0)).order
    documents = [order[Place(0, index)][0] for index in range(24)]
    assert all(len(set(documents[start : start + 3])) == 1 for start in range(0, 24, 3))


def test_documents_are_mixed_inside_a_window_of_chunks_only() -> None:
    """At most WINDOW_CHUNKS shards are therefore read at a time."""
    num_chunks = 3 * WINDOW_CHUNKS
    order = make(([1] * (2 * num_chunks), [2] * num_chunks, 1, 0)).order
    chunks = [order[Place(0, index)][0] // 2 for index in range(2 * num_chunks)]
    windows = [
        set(chunks[start : start + 2 * WINDOW_CHUNKS])
        for start in range(0, 2 * num_chunks, 2 * WINDOW_CHUNKS)
    ]
    assert all(len(window) == WINDOW_CHUNKS for window in windows)
    assert sorted(windows[0]) != list(range(WINDOW_CHUNKS))


def test_epochs_and_seeds_differ() -> None:
    layout = ([3] * 20, [5] * 4, 2, 0)
    order = make(layout).order
    first, second = ([order[Place(epoch, index)] for index in range(60)] for epoch in range(2))
    other = make((*layout[:3], 1)).next(60)
    assert first != second
    assert first != other


def test_a_place_in_another_order_is_refused() -> None:
    state = make(([2, 2], [2], 1, 0)).state_dict()
    with pytest.raises(ValueError, match="number of documents 2, and this run has 3"):
        make(([2, 2, 2], [3], 1, 0)).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 0, and this run has 1"):
        make(([2, 2], [2], 1, 1)).load_state_dict(state)


def test_a_place_in_another_layout_of_the_same_text_is_refused() -> None:
    order = make(([2, 2], [2], 1, 0)).order
    state = TaskStream(order, corpus="text", layout="left").state_dict()
    with pytest.raises(
        ValueError,
        match="belongs to documents in the order with the fingerprint left, and this run has right",
    ):
        TaskStream(order, corpus="text", layout="right").load_state_dict(state)
    del state["made_with"]["documents in the order with the fingerprint"]  # as in older checkpoints
    stream = TaskStream(order, corpus="text", layout="right")
    stream.load_state_dict(state | {"index": 3})
    assert stream.place == Place(epoch=0, index=3)


@given(st.lists(st.integers(), max_size=20), st.integers(1, 7))
def test_shares_of_all_ranks_are_the_step(items: list[int], num_ranks: int) -> None:
    shares = [rank_share(items, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
