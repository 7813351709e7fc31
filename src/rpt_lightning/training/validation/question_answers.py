"""The policy's answers to held-out questions, with and without thinking, each with its verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.box import open_box_content
from rpt_lightning.records.question_results import QuestionResult
from rpt_lightning.rollout.forced_answer import forced_answers
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.types import Completion, Outcome, RolloutGroup, Task

# Most tokens of an answer without a thought. A lower limit on whole completions also applies here.
DIRECT_TOKENS = 128


def answer_questions(
    rollouter: Rollouter, tasks: Sequence[Task], *, num_samples: int, directly: bool
) -> tuple[list[RolloutGroup], list[QuestionResult]]:
    """Answer each question through the engine and judge the completions.

    Args:
        rollouter: Holds the engine.
        tasks: The questions.
        num_samples: Completions of each question at the rollouter's temperature. 0: one greedy completion.
        directly: Whether to add one greedy answer without a thought. The policy writes it into a box that is
            already open, and the text up to the closing of the box is the answer, whatever follows.

    Returns:
        The completions and their results, by question.
    """
    objective = rollouter.objective
    first_indices = rollouter.reserve(tasks, num_samples) if num_samples else [0] * len(tasks)
    rows = rollouter.complete(
        tasks, first_indices, num_samples or 1, temperature=None if num_samples else 0.0
    )
    direct: Sequence[Completion | None] = [None] * len(tasks)
    if directly:
        max_tokens = min(DIRECT_TOKENS, rollouter.sampling.max_completion_tokens)
        direct = forced_answers(rollouter, tasks, [()] * len(tasks), max_tokens=max_tokens)
    groups, results = [], []
    for task, completions, answer in zip(tasks, rows, direct, strict=True):
        predictions = tuple(map(objective.prediction, completions))
        verdicts = _verdicts(objective, task, completions, predictions)
        prompt_ids = objective.prompt_ids(task)
        rewards = tuple(float(verdict == "right") for verdict in verdicts)
        groups.append(
            RolloutGroup(
                task=task,
                prompt_ids=prompt_ids,
                completions=completions,
                predictions=predictions,
                rewards=rewards,
                num_prefix_tokens=len(objective.prompt_of(task).prefix_ids),
            )
        )
        truth, category = objective.truth(task), task.fields.get("category")
        content = None if answer is None else open_box_content(answer.text_bytes)
        results.append(
            QuestionResult(
                question_id=task.task_id,
                answer=b"".join(truth).decode(errors="replace"),
                category=None if category is None else str(category),
                prompt_tokens=len(prompt_ids),
                verdicts=verdicts,
                predictions=tuple(map(_text, predictions)),
                lengths=tuple(len(completion.token_ids) for completion in completions),
                direct_verdict=None if answer is None else _direct_verdict(objective, task, answer, content),
                direct_prediction=_text(content),
            )
        )
    return groups, results


def _verdicts(
    objective: BoundObjective,
    task: Task,
    completions: Sequence[Completion],
    predictions: Sequence[bytes | None],
) -> tuple[Outcome, ...]:
    checked = objective.objective.outcomes(predictions, task)
    return tuple(
        "truncated" if completion.is_truncated else verdict
        for completion, verdict in zip(completions, checked, strict=True)
    )


def _direct_verdict(
    objective: BoundObjective, task: Task, completion: Completion, content: bytes | None
) -> Outcome:
    if content is None and completion.is_truncated:
        return "truncated"
    return objective.objective.outcomes([content], task)[0]


def _text(prediction: bytes | None) -> str | None:
    return None if prediction is None else prediction.decode(errors="replace")
