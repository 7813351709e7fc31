from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.records.field_groups import field_groups, field_names, is_numeric, value_labels
from sample_results import FIRST


def positions(*values, name="depth"):
    return [
        replace(FIRST, task_id=f"d:{k}", position=k, fields=None if value is None else {name: value})
        for k, value in enumerate(values)
    ]


def sizes(values):
    return [(label, len(members)) for label, members in field_groups(positions(*values), "depth")]


def test_few_numbers_are_in_numeric_order():
    assert sizes([10, 9, 10, None, 2, 2.0, -1.5]) == [("-1.5", 1), ("2", 2), ("9", 1), ("10", 2)]
    assert [label for label, _ in sizes([*range(12)])] == [str(value) for value in range(12)]


def test_many_numbers_are_ranges_of_about_equal_size():
    assert sizes([*range(1, 61), None]) == [
        ("1 to 10", 10),
        ("11 to 20", 10),
        ("21 to 30", 10),
        ("31 to 40", 10),
        ("41 to 50", 10),
        ("51 to 60", 10),
    ]
    # Equal values stay together, and 0 is half of all values.
    assert sizes([0] * 13 + [*range(1, 14)]) == [("0", 13), ("1 to 5", 5), ("6 to 9", 4), ("10 to 13", 4)]
    huge = 2**70  # too large for an exact float
    assert sizes([huge + k for k in range(18)])[0] == (f"{huge} to {huge + 2}", 3)


def test_many_texts_are_the_most_frequent_and_the_others():
    assert sizes(["b", "a", "b"]) == [("a", 1), ("b", 2)]
    values = [f"v{k:02}" for k in range(20) for _ in range(k + 1)]
    assert sizes(values) == [(f"v{k:02}", k + 1) for k in range(19, 8, -1)] + [("other", sum(range(1, 10)))]
    named = dict(sizes([*values, *["other"] * 50]))
    assert (named["other"], named["all other"]) == (50, sum(range(1, 11)))
    # In a mix of texts and numbers, all count as texts, and 1 looks like "1".
    assert sizes([1, "1", "x", 2.5]) == [("1", 2), ("2.5", 1), ("x", 1)]


def test_what_there_is():
    rows = [*positions(1, None), *positions("x", name="world")]
    assert field_names(rows) == ["depth", "world"]
    assert (is_numeric(rows, "depth"), is_numeric(rows, "world")) == (True, False)
    assert field_groups(rows, "no such field") == []
    assert field_names(positions(None)) == []


@given(
    st.lists(
        st.one_of(
            st.integers(-20, 20),
            st.floats(allow_nan=False, allow_infinity=False),
            st.sampled_from("abcdefghijklmnopq"),
        ),
        max_size=60,
    )
)
def test_each_position_is_in_one_group(values):
    rows = positions(*values)
    groups = field_groups(rows, "depth")
    assert Counter(one.task_id for _, members in groups for one in members) == Counter(
        one.task_id for one in rows
    )
    assert all(members for _, members in groups)
    assert len({label for label, _ in groups}) == len(groups) <= 12
    assert value_labels(values).keys() == set(values)


@pytest.mark.parametrize("count", [13, 14, 50, 600])
def test_ranges_do_not_overlap_and_hold_about_as_many(count):
    groups = field_groups(positions(*range(count)), "depth")
    members = [[one.fields["depth"] for one in rows] for _, rows in groups]
    assert [value for group in members for value in group] == list(range(count))
    assert max(map(len, members)) - min(map(len, members)) <= 1
    assert len(members) == 6
