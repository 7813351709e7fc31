"""True answers that Math-Verify does not find equal to themselves."""

from __future__ import annotations

import pytest

from rpt_lightning.objectives.math import true_answers
from rpt_lightning.objectives.math.true_answers import other_ways, unlike_themselves
from rpt_lightning.objectives.rewards.answer import AnswerReward

UNLIKE = {
    "2e-1": "0.2",
    "3e5": "300000",
    "½": r"\frac{1}{2}",
    "x²": "x^{2}",
    "12 500": "12500",
    "1_000": "1000",
    "3 1/2": r"3\frac{1}{2}",
    "True": "true",
}
LIKE = ["17", "-2.5", "3/4", r"\frac{3}{4}", r"2\sqrt{3}", "12,500", r"\infty", "0.00001"]


def test_each_is_found_with_the_way_that_it_does_not_equal(answer_reward: AnswerReward) -> None:
    assert unlike_themselves([*LIKE, *UNLIKE, *UNLIKE], answer_reward.verifier) == (UNLIKE, 0)


def test_what_nothing_can_be_read_of_is_found(answer_reward: AnswerReward) -> None:
    assert unlike_themselves([" "], answer_reward.verifier) == ({" ": " "}, 0)


def test_of_many_plain_ones_some_are_asked_about(
    answer_reward: AnswerReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(true_answers, "MAX_PLAIN", 1)
    assert unlike_themselves(["a+b", "b+c", "c+d", "1 000", "7"], answer_reward.verifier) == (
        {"1 000": "1000"},
        2,
    )


@pytest.mark.parametrize(
    ("answer", "ways"),
    [
        ("1.234", []),
        ("1.234.567", ["1234567"]),
        (r"1\,234", ["1234"]),
        ("1,23", []),
        ("2·√5", [r"2\cdot \sqrt{5}"]),
        ("√(x+1)", [r"\sqrt{x+1}"]),
    ],
)
def test_other_ways(answer: str, ways: list[str]) -> None:
    assert other_ways(answer) == ways
