from __future__ import annotations

import pytest

from rpt_lightning.evaluation.reasoning_patterns import PATTERNS, pattern_shares, patterns_of, relative_change
from rpt_lightning.evaluation.tables.stages import Rate
from rpt_lightning.metrics.interval import clustered_interval, wilson_interval


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Alternatively, it ends.", {"transition"}),
        ("WAIT. Hmm", {"reflection"}),
        ("await waiting waits wait_for waiter", set()),
        ("(wait)", {"reflection"}),
        ("apples, pears, etc.", {"divergent"}),
        ("apples, etc.), pears", {"divergent"}),
        ("etc", set()),
        ("etcetera fetch.", set()),
        ("etc.x", set()),
        ("Let me break\n  this down", {"breakdown"}),
        ("a breakdown, breaks down", set()),
        ("or something like it", {"divergent", "hypothesis"}),
        ("neither optional otherwisely improbably", set()),
        ("In conclusion we conclude", {"deduction"}),
        ("inconclusion concluded", set()),
        ("", set()),
    ],
)
def test_keywords_are_whole_words(text, expected):
    assert patterns_of(text) == expected


@pytest.mark.parametrize(
    "keyword", [(name, keyword) for name, keywords in PATTERNS.items() for keyword in keywords]
)
def test_every_keyword_of_the_paper_is_found(keyword):
    name, word = keyword
    assert name in patterns_of(f"so {word.capitalize()}, then")
    assert name not in patterns_of(f"so x{word}, then")


def test_shares_count_texts_not_keywords():
    shares = pattern_shares(["wait, wait, wait", "probably, wait", "nothing"])
    assert shares["reflection"] == Rate(2, 3)
    assert shares["hypothesis"] == Rate(1, 3)
    assert shares["deduction"] == Rate(0, 3)
    assert set(pattern_shares([]).values()) == {Rate(0, 0)}


def test_texts_of_one_task_are_not_independent():
    texts = ["wait"] * 8 + ["so"] * 8 + ["wait"] * 8 + ["so"] * 8
    tasks = [f"t{number // 8}" for number in range(32)]
    shares = pattern_shares(texts, tasks=tasks)["reflection"]
    assert (shares.successes, shares.count) == (16, 32)
    # The texts of every task agree, so they carry as much information as 4 texts.
    assert shares.interval == pytest.approx(wilson_interval(2, 4))
    assert str(shares) == "50.0 % [15.0, 85.0] 16/32"
    assert pattern_shares(texts)["reflection"].interval == wilson_interval(16, 32)
    # Another order, and tasks with unequal numbers of texts.
    mixed = pattern_shares(["wait", "so", "so", "wait", "so"], tasks=["a", "b", "b", "a", "b"])["reflection"]
    assert mixed.interval == pytest.approx(clustered_interval([1.0, 0.0], samples_each=[2, 3]))


def test_relative_change_as_in_the_paper():
    assert relative_change(Rate(50, 1000), Rate(1309, 10_000)) == pytest.approx(1.618)
    assert relative_change(Rate(40, 100), Rate(30, 100)) == -0.25
    assert relative_change(Rate(3, 10), Rate(0, 10)) == -1.0
    assert relative_change(Rate(0, 10), Rate(3, 10)) is None
    assert relative_change(Rate(0, 0), Rate(3, 10)) is None
    assert relative_change(Rate(3, 10), Rate(0, 0)) is None
