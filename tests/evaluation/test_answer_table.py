"""The tables of answered questions, checked with numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rpt_lightning.evaluation.tables.answers import (
    AnswerStage,
    answer_table,
    before_after_table,
    category_table,
    differences,
)
from rpt_lightning.records.question_results import QuestionResult, QuestionResults


def question(
    name: str, rights: str, *, category: str | None = None, direct: bool | None = None
) -> QuestionResult:
    """Make a question. ``rights`` has r for a right completion, w wrong, t truncated, ? out of time."""
    verdicts: Any = tuple(
        {"r": "right", "w": "wrong", "t": "truncated", "?": "timeout"}[letter] for letter in rights
    )
    return QuestionResult(
        question_id=name,
        answer="4",
        category=category,
        prompt_tokens=10,
        verdicts=verdicts,
        predictions=("4",) * len(rights),
        lengths=(20,) * len(rights),
        direct_verdict=None if direct is None else "right" if direct else "wrong",
    )


def stage(name: str, *questions: QuestionResult, **meta: Any) -> AnswerStage:
    defaults = {
        "benchmark": "sums",
        "policy_path": name,
        "step": 0,
        "temperature": 0.6,
        "max_completion_tokens": 64,
        "seed": 0,
    }
    return AnswerStage(name=name, results=QuestionResults(questions=questions, **(defaults | meta)))


def rows(table: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in table.split("\n") if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_accuracy_pass_at_k_and_what_became_of_completions() -> None:
    one = stage(
        "one", question("a", "rrrr", direct=True), question("b", "rwwt", direct=False), question("c", "wwt?")
    )
    table = rows(answer_table([one]))
    assert table["sums"] == ["one"]
    assert table["questions x completions"] == ["3 x 4"]
    # (4 + 1 + 0) / 12 = 5/12. Var(1, 1/4, 0) = (49 + 4 + 25) / 432, so n = 3 (5/12) (7/12) / Var = 4.0385.
    # Wilson's formula then gives 0.4573 +- 0.3466.
    assert table["accuracy after a thought (avg@4)"] == ["41.7 % [11.1, 80.4] 3 questions x 4"]
    # pass@2 of 4, 1 and 0 right among 4: 1, 1 - C(3, 2) / C(4, 2) = 1/2, 0.
    assert table["pass@2"][0].startswith("50.0 % [")
    assert table["pass@4"][0].startswith("66.7 % [")
    assert "pass@8" not in table
    assert table["accuracy without a thought"] == ["50.0 % [9.5, 90.5] 1/2 (measured at 2 of 3)"]
    assert table["truncated completions"] == ["16.7 % 2/12"]
    assert table["checks out of time"] == ["8.3 % 1/12"]
    assert table["checks that failed"] == ["0.0 % 0/12"]


def test_categories_have_counts_of_their_own() -> None:
    one = stage(
        "one",
        question("a", "r", category="algebra", direct=True),
        question("b", "w", category="algebra", direct=True),
        question("c", "r", category="law"),
    )
    table = category_table([one])
    assert table is not None
    assert rows(table)["algebra: after a thought"] == ["50.0 % [9.5, 90.5] 2 questions"]
    assert rows(table)["algebra: without"] == ["100.0 % [34.2, 100.0] 2/2"]
    assert rows(table)["law: after a thought"] == ["100.0 % [20.7, 100.0] 1 questions"]
    assert rows(table)["law: without"] == ["not measured"]
    assert category_table([stage("one", question("a", "r"))]) is None


def test_differences_are_paired_by_question() -> None:
    first = stage(
        "first", *(question(str(number), "rw" if number % 2 else "ww", direct=False) for number in range(40))
    )
    second = stage(
        "second",
        *(question(str(number), "rr" if number % 2 else "rw", direct=True) for number in reversed(range(40))),
    )
    lines = differences([first, second])
    # Every question gains exactly one half, so no resample differs.
    assert (
        lines[0] == "- after a thought: second - first: +50.0 points, 95 % interval [+50.0, +50.0] above 0 "
        "(paired bootstrap over 40 questions)"
    )
    assert lines[1].startswith("- without: second - first: +100.0 points")
    assert lines[2].startswith("- second: after a thought - without: -25.0 points")
    with pytest.raises(ValueError, match="are to different questions"):
        differences([first, stage("other", question("x", "rw"))])


def test_before_and_after_training_is_the_papers_table() -> None:
    base = [stage("base", *(question(str(number), "rwww", direct=number < 5) for number in range(20)))]
    base.append(
        stage(
            "base",
            *(question(str(number), "rrww", direct=number < 10) for number in range(20)),
            step=40,
            policy_path="base",
        )
    )
    rpt = [stage("rpt", *(question(str(number), "rrww") for number in range(20)))]
    rpt.append(
        stage(
            "rpt",
            *(question(str(number), "rrrr") for number in reversed(range(20))),
            step=40,
            policy_path="rpt",
        )
    )
    table = before_after_table([base, rpt])
    assert table is not None
    assert rows(table)["sums"] == [
        "before",
        "after",
        "after - before",
        "before, without a thought",
        "after, without a thought",
    ]
    assert rows(table)["base"][1].endswith("20 questions x 4 at step 40")
    assert [cell.split(" [")[0] for cell in rows(table)["base"]] == [
        "25.0 %",
        "50.0 %",
        "+25.0 points",
        "25.0 %",
        "50.0 %",
    ]
    assert rows(table)["base"][3].endswith("5/20")
    assert [cell.split(" [")[0] for cell in rows(table)["rpt"]] == [
        "50.0 %",
        "100.0 %",
        "+50.0 points",
        "not measured",
        "not measured",
    ]
    for line, difference in (("before", "+25.0"), ("after", "+50.0"), ("gain", "+25.0")):
        assert f"- {line}: rpt - base: {difference} points" in table
    assert before_after_table([base[:1], rpt[:1]]) is None
    assert before_after_table([[base[0], replace(base[0], name="again")]]) is None  # the same weights twice
    halfway = replace(base[1], results=replace(base[1].results, step=20))
    assert before_after_table([[halfway, base[1]]]) is None  # some of the training is behind both


def test_completions_that_were_drawn_otherwise_are_not_compared() -> None:
    sampled = stage("sampled", *(question(str(number), "rrrw", direct=False) for number in range(20)))
    greedy = stage(
        "greedy", *(question(str(number), "r", direct=True) for number in range(20)), temperature=0.0
    )
    refused, without, own = differences([sampled, greedy])
    assert refused == (
        "- after a thought: greedy - sampled: not compared, because the completions were drawn with other "
        "settings (completions per question 4 and 1; temperature 0.6 and 0.0)"
    )
    assert without.startswith("- without: greedy - sampled: +100.0 points")  # greedy in both
    assert own.startswith("- greedy: after a thought - without: +0.0 points")
    longer = replace(sampled, results=replace(sampled.results, max_completion_tokens=128))
    assert "drawn with other settings (token limit 64 and 128)" in differences([sampled, longer])[0]
    with pytest.raises(ValueError, match="are to different questions"):
        differences([sampled, stage("other", question("x", "r"), temperature=0.0)])


def test_the_row_of_accuracies_is_named_for_every_column() -> None:
    four, one = stage("four", question("a", "rrrw")), stage("one", question("a", "r"))
    assert rows(answer_table([four, one]))["accuracy after a thought (mean over completions)"][1].endswith(
        "1 questions"
    )
    assert rows(answer_table([one, one]))["accuracy after a thought"][0].startswith("100.0 %")
    assert "accuracy after a thought (avg@4)" in rows(answer_table([four]))


def test_a_run_whose_end_was_drawn_otherwise_than_its_start() -> None:
    runs = []
    for name, temperature in (("base", 0.6), ("rpt", 1.0)):
        before = stage(name, *(question(str(number), "rwww") for number in range(20)))
        after = stage(
            name, *(question(str(number), "rrww") for number in range(20)), step=40, temperature=temperature
        )
        runs.append([before, after])
    table = before_after_table(runs)
    assert table is not None
    assert [rows(table)[name][2].split(" [")[0] for name in ("base", "rpt")] == [
        "+25.0 points",
        "not compared: temperature 0.6 and 1.0",
    ]
    assert "- before: rpt - base: +0.0 points" in table
    assert (
        "- after: rpt - base: not compared, because the completions were drawn with other settings "
        "(temperature 0.6 and 1.0)" in table
    )
    assert "- gain: rpt - base: not compared" in table
