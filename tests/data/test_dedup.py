from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.data.prepare.dedup import (
    SPAN,
    components,
    count_shared_spans,
    span_hashes,
    split_components,
)


def tokens(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_thirteen_shared_tokens_link_and_twelve_do_not() -> None:
    shared = list(range(100, 113))
    documents = [
        tokens(1, *shared, 2),
        tokens(3, 4, *shared),
        tokens(5, *shared[:12], 6),
        tokens(*range(200, 230)),
    ]
    assert components(documents).tolist() == [0, 0, 1, 2]


def test_components_are_transitive() -> None:
    left, right = list(range(100, 113)), list(range(200, 213))
    documents = [tokens(*left), tokens(*right), tokens(*left, 9, *right)]
    assert components(documents).tolist() == [0, 0, 0]


def test_short_documents_link_only_to_their_copies() -> None:
    documents = [tokens(1, 2, 3), tokens(1, 2, 3), tokens(1, 2, 3, 4), tokens(*range(1, 20)), tokens()]
    assert components(documents).tolist() == [0, 0, 1, 2, 3]


def brute_components(documents: list[np.ndarray], span: int) -> list[set[int]]:
    groups = [{index} for index in range(len(documents))]
    for i, left in enumerate(documents):
        for j, right in enumerate(documents):
            spans = {tuple(left[k : k + span]) for k in range(len(left) - span + 1)} & {
                tuple(right[k : k + span]) for k in range(len(right) - span + 1)
            }
            if spans and groups[i] is not groups[j]:
                groups[i] |= groups[j]
                for member in groups[i]:
                    groups[member] = groups[i]
    return groups


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=12), min_size=1, max_size=8))
def test_components_equal_a_plain_search(rows: list[list[int]]) -> None:
    documents = [tokens(*row) for row in rows]
    component = components(documents, span=3)
    for index, group in enumerate(brute_components(documents, 3)):
        assert set(np.flatnonzero(component == component[index]).tolist()) == group


def test_span_hashes_see_order_and_length() -> None:
    ids = tokens(*range(14))
    assert len(span_hashes(ids)) == 2
    assert len(span_hashes(ids[:12])) == 0
    assert span_hashes(ids[:13])[0] != span_hashes(ids[:13][::-1].copy())[0]
    assert span_hashes(tokens(0, 1, 2), 2)[0] == span_hashes(tokens(7, 0, 1), 2)[1]


@given(st.lists(st.integers(0, 9), min_size=12, max_size=40), st.integers(0, 5))
def test_the_split_is_clean(assignment: list[int], seed: int) -> None:
    component = np.unique(np.array(assignment), return_inverse=True)[1].astype(np.int32)
    num_components = component.max() + 1
    num_heldout = min(2, num_components - 1)
    split = split_components(component, num_heldout=num_heldout, seed=seed)
    assert split == split_components(component, num_heldout=num_heldout, seed=seed)
    train, heldout = {component[i] for i in split.train}, [component[i] for i in split.heldout]
    assert len(set(heldout)) == len(heldout) == num_heldout
    assert not train & set(heldout)
    assert len(split.train) + len(split.heldout) + split.num_heldout_siblings == len(assignment)
    sizes = np.bincount(component)
    assert split.largest_component == sizes.max()
    if sizes.max() > 1:
        assert sizes.argmax() in train


def test_too_few_components() -> None:
    with pytest.raises(
        ValueError,
        match=r"--heldout_documents 2: .* only 2 components that share no 13 tokens "
        r".*logs.*--dedup_span, which is 13.*null",
    ):
        split_components(np.array([0, 0, 1], dtype=np.int32), num_heldout=2, seed=0)
    with pytest.raises(ValueError, match=r"share no 40 tokens in a row.*--dedup_span, which is 40"):
        split_components(np.array([0, 0, 1], dtype=np.int32), num_heldout=2, seed=0, span=40)
    with pytest.raises(
        ValueError, match=r"only 3 components of one document each \(--dedup_span null\).*give more text$"
    ):
        split_components(np.arange(3, dtype=np.int32), num_heldout=3, seed=0, span=None)


def test_without_a_span_no_documents_link() -> None:
    """The text is made from a template: all but two tokens are the same in every document."""
    template = list(range(100, 200))
    documents = [tokens(*template, number) for number in range(6)]
    assert components(documents).tolist() == [0] * 6
    assert components(documents, span=100).tolist() == [0] * 6
    assert components(documents, span=101).tolist() == list(range(6))
    assert components(documents, span=None).tolist() == list(range(6))
    split = split_components(components(documents, span=None), num_heldout=2, seed=0, span=None)
    assert (len(split.train), len(split.heldout), split.num_heldout_siblings) == (4, 2, 0)
    assert count_shared_spans(documents[:4], documents[4:], None) == 0
    assert count_shared_spans(documents[:4], [*documents[3:], documents[3]], None) == 1
    assert count_shared_spans(documents[:4], documents[4:], 101) == 0
    assert count_shared_spans(documents[:4], documents[4:], 100) == 1


def test_shared_spans_are_counted_on_the_tokens() -> None:
    shared = list(range(100, 100 + SPAN + 1))  # two spans
    assert count_shared_spans([tokens(1, *shared)], [tokens(*shared, 2)]) == 2
    assert count_shared_spans([tokens(1, *shared[:12])], [tokens(*shared, 2)]) == 0
    # Equal bytes at an odd offset are not equal tokens.
    assert count_shared_spans([tokens(*([256] * 14))], [tokens(*([1] * 14))]) == 0
