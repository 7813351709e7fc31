"""Markdown tables and differences of answered questions.

They show a benchmark's policies side by side, and fine-tuning runs before and after training.

No accuracy stands alone. Each comes with its count and its 95 % interval, which treats the completions of
a question as one cluster. Beside it stands the accuracy of the same weights without a thought. Differences
are paired, question by question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rpt_lightning.evaluation.paired_bootstrap import Difference, paired_bootstrap
from rpt_lightning.evaluation.tables.stages import Rate, comparison_line, markdown_row, markdown_table
from rpt_lightning.metrics.interval import clustered_interval
from rpt_lightning.metrics.pass_at_k import pass_at_k
from rpt_lightning.records.question_results import QuestionResult, QuestionResults, pair_questions
from rpt_lightning.types import Outcome

NOTE = (
    "Intervals are Wilson's, and the completions of a question form one cluster. Differences are paired and "
    "resample questions. Without a thought: one greedy answer in a box that the prompt has already opened."
)
_VERDICT_ROWS: dict[str, Outcome] = {
    "truncated completions": "truncated",
    "completions without an answer in a box": "unboxed",
    "answers that repeat the question": "quoted",
    "answers that cannot be read": "unreadable",
    "checks out of time": "timeout",
    "checks that failed": "error",
}


@dataclass(frozen=True, kw_only=True)
class AnswerStage:
    """One column: a named policy and its answers."""

    name: str
    results: QuestionResults


def answer_table(stages: Sequence[AnswerStage]) -> str:
    """Build the main table, with one column for each policy.

    Its rows are accuracy with and without a thought, pass@k, and the outcomes of the completions.
    """
    rows = [
        _row(
            "questions x completions",
            stages,
            lambda results: f"{len(results.questions)} x {results.num_samples}",
        )
    ]
    rows.append(
        _row(
            "temperature, token limit",
            stages,
            lambda results: f"{results.temperature}, {results.max_completion_tokens}",
        )
    )
    rows.append(_row(_accuracy_name(stages), stages, _accuracy))
    most = max(stage.results.num_samples for stage in stages)
    for k in (2**power for power in range(1, most.bit_length())):
        rows.append(_row(f"pass@{k}", stages, lambda results, k=k: _pass_at(results, k)))  # type: ignore[misc]
    rows.append(_row("accuracy without a thought", stages, lambda results: _direct(results.questions)))
    for name, verdict in _VERDICT_ROWS.items():
        rows.append(_row(name, stages, lambda results, verdict=verdict: _share(results, verdict)))  # type: ignore[misc]
    rows.append(
        _row(
            "mean length (tokens)",
            stages,
            lambda results: f"{fmean(n for q in results.questions for n in q.lengths):.1f}",
        )
    )
    return markdown_table(stages[0].results.benchmark, [stage.name for stage in stages], rows)


def category_table(stages: Sequence[AnswerStage]) -> str | None:
    """Build the table of accuracy by category, with and without a thought.

    Returns None if the questions have no categories.
    """
    categories = sorted(
        {question.category for question in stages[0].results.questions if question.category is not None}
    )
    if not categories:
        return None
    rows = []
    for category in categories:
        selections = [
            [question for question in stage.results.questions if question.category == category]
            for stage in stages
        ]
        rows.append(
            markdown_row(f"{category}: after a thought", [_mean(selection) for selection in selections])
        )
        rows.append(markdown_row(f"{category}: without", [_direct(selection) for selection in selections]))
    return markdown_table("by category", [stage.name for stage in stages], rows)


def differences(stages: Sequence[AnswerStage]) -> list[str]:
    """Compare the last policy with each earlier one, with and without a thought.

    It is also compared with its own answers without a thought. Accuracies after a thought are compared only
    if both policies drew their completions with the same settings. Otherwise the line says what differs.

    Raises:
        ValueError: Two policies were not asked the same questions.
    """
    last = stages[-1]
    lines = []
    for earlier in reversed(stages[:-1]):
        lines.append(
            _thought_line(f"after a thought: {last.name} - {earlier.name}", earlier.results, last.results)
        )
        pairs = [
            (one, other)
            for one, other in pair_questions(earlier.results, last.results)
            if one.direct_verdict and other.direct_verdict
        ]
        if pairs:
            lines.append(
                _line(
                    f"without: {last.name} - {earlier.name}",
                    _difference([(_is_direct(a), _is_direct(b), b) for a, b in pairs]),
                )
            )
    own = [
        (_is_direct(question), question.right_frac, question)
        for question in last.results.questions
        if question.direct_verdict
    ]
    if own:
        lines.append(_line(f"{last.name}: after a thought - without", _difference(own)))
    return lines


def before_after_table(runs: Sequence[Sequence[AnswerStage]]) -> str | None:
    """Build a table with one row for each run that was asked before and after training.

    This is the paper's table of RLVR after RPT. Below it stand the gains against the first such run. Each
    run's stages are in the order of their steps. The first one counts as "before" if no step was trained
    yet, and the last one counts as "after". Both accuracies stand beside the accuracy of the same weights
    without a thought.

    Returns None if there is no such run.
    """
    trained = [stages for stages in runs if stages[0].results.step == 0 < stages[-1].results.step]
    if not trained:
        return None
    columns = ["before", "after", "after - before", "before, without a thought", "after, without a thought"]
    table = markdown_table(
        trained[0][0].results.benchmark,
        columns,
        [markdown_row(stages[-1].name, _before_after(stages)) for stages in trained],
    )
    first, *others = trained
    lines = [line for other in others for line in _gains(first, other)]
    return "\n\n".join([table, *(["\n".join(lines)] if lines else [])])


def _gains(first: Sequence[AnswerStage], other: Sequence[AnswerStage]) -> list[str]:
    """Compare a run with the first one before and after training, and compare their gains."""
    names = f"{other[-1].name} - {first[-1].name}"
    lines = [
        _thought_line(f"{moment}: {names}", first[place].results, other[place].results)
        for moment, place in (("before", 0), ("after", -1))
        if first[place] is not other[place]  # both runs have the same start
    ]
    if differing := _differing_settings(
        *(stages[place].results for stages in (first, other) for place in (0, -1))
    ):
        return [*lines, _refusal(f"gain: {names}", differing)]
    gains = [
        (one[1].right_frac - one[0].right_frac, two[1].right_frac - two[0].right_frac, two[1])
        for one, two in zip(_moments(first, like=other), _moments(other, like=other), strict=True)
    ]
    return [*lines, _line(f"gain: {names}", _difference(gains))]


def _moments(
    stages: Sequence[AnswerStage], *, like: Sequence[AnswerStage]
) -> list[tuple[QuestionResult, QuestionResult]]:
    """Pair each question before and after training, in the order of ``like``'s first questions."""
    order = [question.question_id for question in like[0].results.questions]
    pairs = {
        before.question_id: (before, after)
        for before, after in pair_questions(stages[0].results, stages[-1].results)
    }
    return [pairs[question_id] for question_id in order]


def _before_after(stages: Sequence[AnswerStage]) -> list[str]:
    before, after = stages[0].results, stages[-1].results
    pairs = pair_questions(before, after)
    if differing := _differing_settings(before, after):
        change = f"not compared: {differing}"
    else:
        gain = _difference([(one.right_frac, other.right_frac, one) for one, other in pairs])
        change = f"{100 * gain.difference:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    return [
        _accuracy(before),
        f"{_accuracy(after)} at step {after.step}",
        change,
        _direct(before.questions),
        _direct(after.questions),
    ]


def _differing_settings(*evaluations: QuestionResults) -> str:
    """Describe the sampling settings that differ, or return an empty string if none do."""
    settings: dict[str, list[float]] = {
        "completions per question": [results.num_samples for results in evaluations],
        "temperature": [results.temperature for results in evaluations],
        "token limit": [results.max_completion_tokens for results in evaluations],
    }
    return "; ".join(
        f"{name} {' and '.join(map(str, dict.fromkeys(values)))}"
        for name, values in settings.items()
        if len(set(values)) > 1
    )


def _thought_line(name: str, first: QuestionResults, second: QuestionResults) -> str:
    """Compare ``second`` with ``first`` by accuracy after a thought.

    Raises ValueError as `pair_questions` does, even if the completions were drawn with other settings.
    """
    pairs = pair_questions(first, second)
    if differing := _differing_settings(first, second):
        return _refusal(name, differing)
    return _line(name, _difference([(one.right_frac, other.right_frac, one) for one, other in pairs]))


def _refusal(name: str, differing: str) -> str:
    return f"- {name}: not compared, because the completions were drawn with other settings ({differing})"


def _difference(pairs: Sequence[tuple[float, float, QuestionResult]]) -> Difference:
    return paired_bootstrap(
        [one for one, _, _ in pairs],
        [other for _, other, _ in pairs],
        units=[question.question_id for _, _, question in pairs],
    )


def _line(name: str, difference: Difference) -> str:
    return comparison_line(name, difference, units=f"{difference.num_units} questions")


def _accuracy_name(stages: Sequence[AnswerStage]) -> str:
    """A label that is true of every column. It says avg@k only if all policies drew equally many samples."""
    numbers = {stage.results.num_samples for stage in stages}
    if len(numbers) > 1:
        return "accuracy after a thought (mean over completions)"
    return (
        "accuracy after a thought"
        if numbers == {1}
        else f"accuracy after a thought (avg@{stages[0].results.num_samples})"
    )


def _accuracy(results: QuestionResults) -> str:
    return _mean(results.questions)


def _mean(questions: Sequence[QuestionResult]) -> str:
    return (
        _interval_text(
            [question.right_frac for question in questions], samples_each=len(questions[0].verdicts)
        )
        if questions
        else "no questions"
    )


def _pass_at(results: QuestionResults, k: int) -> str:
    if k > results.num_samples:
        return "not measured"
    return _interval_text(
        [pass_at_k(results.num_samples, question.num_right, k) for question in results.questions],
        samples_each=1,
    )


def _interval_text(values: Sequence[float], *, samples_each: int) -> str:
    low, high = clustered_interval(values, samples_each=samples_each)
    count = f"{len(values)} questions" + (f" x {samples_each}" if samples_each > 1 else "")
    return f"{100 * fmean(values):.1f} % [{100 * low:.1f}, {100 * high:.1f}] {count}"


def _direct(questions: Sequence[QuestionResult]) -> str:
    rate = Rate.of(
        [None if question.direct_verdict is None else _is_direct(question) for question in questions]
    )
    return (
        f"{rate} (measured at {rate.count} of {len(questions)})"
        if 0 < rate.count < len(questions)
        else str(rate)
    )


def _is_direct(question: QuestionResult) -> bool:
    return question.direct_verdict == "right"


def _share(results: QuestionResults, verdict: Outcome) -> str:
    verdicts = [found for question in results.questions for found in question.verdicts]
    number = verdicts.count(verdict)
    return f"{100 * number / len(verdicts):.1f} % {number}/{len(verdicts)}"


def _row(name: str, stages: Sequence[AnswerStage], cell: Callable[[QuestionResults], str]) -> str:
    return markdown_row(name, [cell(stage.results) for stage in stages])
