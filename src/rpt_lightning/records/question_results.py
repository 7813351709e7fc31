"""Records of a validation or benchmark: one for each question.

They are written as a JSONL file, and beside it stands a JSON file that describes the policy. Results are kept
for each question so that any two policies can be compared in pairs, long after both runs have ended.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rpt_lightning.records.record_file import read_about, read_lines, write_about, write_lines
from rpt_lightning.records.record_types import check_types
from rpt_lightning.types import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionResult:
    """The answers of one policy to one question.

    ``verdicts``, ``predictions`` and ``lengths`` (tokens) have one entry for each completion that thinks
    first. ``direct_verdict`` and ``direct_prediction`` belong to one greedy answer without a thought, which
    the policy gives inside a box that is already open. They are None if it was not asked for one.

    >>> result = QuestionResult(
    ...     question_id="q-1", answer="4", category=None, prompt_tokens=12, verdicts=("right", "truncated"),
    ...     predictions=("4", None), lengths=(9, 64),
    ... )
    >>> result.num_right, result.right_frac
    (1, 0.5)
    """

    question_id: str
    answer: str
    category: str | None
    prompt_tokens: int
    verdicts: tuple[Outcome, ...]
    predictions: tuple[str | None, ...]
    lengths: tuple[int, ...]
    direct_verdict: Outcome | None = None
    direct_prediction: str | None = None

    @property
    def num_right(self) -> int:
        return self.verdicts.count("right")

    @property
    def right_frac(self) -> float:
        return self.num_right / len(self.verdicts)


@dataclass(frozen=True, kw_only=True)
class QuestionResults:
    """All questions of one evaluation, and the weights that answered.

    The weights are those of ``policy_path`` after ``step`` optimizer steps. ``ckpt_path`` is the checkpoint
    they were read from, if there was one. ``benchmark`` names the questions. A ``temperature`` of 0 means one
    greedy completion for each question. ``max_completion_tokens`` limits a completion, and ``seed`` is the
    seed of the samples.
    """

    questions: tuple[QuestionResult, ...]
    benchmark: str
    policy_path: str
    step: int
    temperature: float
    max_completion_tokens: int
    seed: int
    ckpt_path: str | None = None

    @property
    def num_samples(self) -> int:
        return len(self.questions[0].verdicts)


def write_question_results(results: QuestionResults, path: Path) -> None:
    """Write ``path`` (one question for each line) and then the JSON file beside it.

    The JSON file is ``path`` with the suffix ``.json``. Without it the lines are not trusted.
    """
    write_lines(map(asdict, results.questions), path)
    about = {
        field.name: getattr(results, field.name)
        for field in fields(QuestionResults)
        if field.name != "questions"
    }
    write_about(about | {"num_questions": len(results.questions)}, path)


def read_question_results(path: Path) -> QuestionResults:
    """Read files that ``write_question_results`` wrote.

    Raises:
        ValueError: A file is missing or broken, the JSON file has an unknown field, questions have different
            numbers of completions, or there are fewer lines than the JSON file says (an evaluation that was
            interrupted).
    """
    known = {
        field.name: field.default is MISSING for field in fields(QuestionResults) if field.name != "questions"
    }
    needed = [name for name, is_needed in known.items() if is_needed]
    about = read_about(path, command="rpt evaluate benchmark", needed=[*needed, "num_questions"])
    check_types(about, QuestionResults, str(path.with_suffix(".json")))
    num_questions = about.pop("num_questions")
    if unknown := sorted(about.keys() - known.keys()):
        raise ValueError(
            f"{path.with_suffix('.json')}: {', '.join(unknown)} is not known here. Was it written by a later "
            "version? Read it with that version, or run `rpt evaluate benchmark` again."
        )
    questions = tuple(read_lines(path, _parse_line))
    if not questions or len(questions) != num_questions:
        raise ValueError(
            f"{path}: {len(questions)} questions, which is not what {path.with_suffix('.json').name} says. "
            "Run `rpt evaluate benchmark` again."
        )
    if len({len(question.verdicts) for question in questions}) > 1:
        raise ValueError(
            f"{path}: the questions have different numbers of completions, so they have no common average."
        )
    return QuestionResults(questions=questions, **about)


def pair_questions(
    first: QuestionResults, second: QuestionResults
) -> list[tuple[QuestionResult, QuestionResult]]:
    """Pair the questions of two policies, in the order of ``first``.

    Raises:
        ValueError: The two were not asked exactly the same questions.
    """
    by_id = {question.question_id: question for question in second.questions}
    ids = {question.question_id for question in first.questions}
    if unpaired := sorted(ids ^ by_id.keys()):
        raise ValueError(
            f"Answers of {first.policy_path} ({len(ids)} questions of {first.benchmark}) and "
            f"{second.policy_path} ({len(by_id)} of {second.benchmark}) are to different questions, "
            f"for example {unpaired[0]!r}. Ask both the same benchmark, with the same number of questions "
            "and the same seed."
        )
    pairs = [(question, by_id[question.question_id]) for question in first.questions]
    for one, other in pairs:
        if one.answer != other.answer:
            raise ValueError(
                f"Question {one.question_id!r} has the answer {one.answer!r} in one result and "
                f"{other.answer!r} in the other."
            )
    return pairs


def _parse_line(line: str, where: str) -> QuestionResult:
    try:
        row: dict[str, Any] = json.loads(line)
        row |= {name: tuple(value) for name, value in row.items() if isinstance(value, list)}
        result = QuestionResult(**row)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        names = ", ".join(field.name for field in fields(QuestionResult))
        raise ValueError(
            f"{where}: not an answered question ({error}). Expected one JSON object with {names}."
        ) from error
    check_types(row, QuestionResult, where)
    return result
