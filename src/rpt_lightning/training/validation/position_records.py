"""The records of one validation: made position by position, gathered from all ranks, and summed up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import torch

from rpt_lightning.metrics.accuracy import NextTokenAccuracy
from rpt_lightning.metrics.token_kind import token_kind
from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.records.results import PositionResult
from rpt_lightning.training.validation.heldout_answers import HeldoutAnswer
from rpt_lightning.types import Task


def position_result(
    task: Task,
    objective: BoundObjective,
    *,
    ntp_correct: bool,
    ntp_logprob: float,
    context_tokens: int,
    answer: HeldoutAnswer | None,
) -> PositionResult:
    """The record of one position. Bytes that are not characters become replacement characters.

    A right prediction always means the same, whatever the policy is rewarded for in training: the objective
    says what is right. ``ntp_correct`` and ``ntp_logprob`` are the direct answer, without a thought.
    """
    assert task.entropy is not None
    truth = objective.truth(task)
    measured: dict[str, Any] = {}
    if answer is not None:
        (completion,), (prediction,) = answer.greedy.completions, answer.greedy.predictions
        measured |= {f"{name}_correct": correct for name, correct in answer.controls.items()}
        measured |= {
            "prediction": None if prediction is None else prediction.decode(errors="replace"),
            "reasoning_correct": objective.is_right(prediction, task),
            "boxed": prediction is not None,
            "truncated": completion.is_truncated,
            "length": len(completion.token_ids),
            "thought_length": answer.thought_length,
            "prompt_tokens": len(answer.greedy.prompt_ids),
        }
        if answer.samples is not None:
            measured |= {
                "num_samples": len(answer.samples.completions),
                "num_correct": sum(
                    objective.is_right(prediction, task) for prediction in answer.samples.predictions
                ),
                "sampled_tokens": sum(len(sample.token_ids) for sample in answer.samples.completions),
            }
    return PositionResult(
        task_id=task.task_id,
        doc_id=task.doc_id,
        position=task.position,
        entropy=task.entropy,
        answerable=task.answerable,
        truth=b"".join(truth).decode(errors="replace"),
        ntp_correct=ntp_correct,
        ntp_logprob=ntp_logprob,
        token_kind=token_kind(truth[0]),
        context_tokens=context_tokens,
        fields=dict(task.fields) or None,
        **measured,
    )


def unique_results(rows: Iterable[PositionResult]) -> list[PositionResult]:
    """Drop duplicate positions."""
    return list({row.task_id: row for row in rows}.values())


def ntp_accuracy(rows: Sequence[PositionResult]) -> dict[str, float]:
    """`NextTokenAccuracy` without reasoning, from gathered records."""
    return _accuracy(rows, [row.ntp_correct for row in rows])


def reasoning_accuracy(rows: Sequence[PositionResult]) -> dict[str, float] | None:
    """`NextTokenAccuracy` by reasoning, from gathered records. None if it was not measured."""
    if all(row.reasoning_correct is None for row in rows):
        return None
    return _accuracy(rows, [bool(row.reasoning_correct) for row in rows])


def validation_metrics(rows: Sequence[PositionResult]) -> dict[str, float]:
    """The metrics of a validation, from gathered records. Empty if there are no records."""
    if not rows:
        return {}
    metrics = {f"val/ntp/{name}": value for name, value in ntp_accuracy(rows).items()}
    metrics["val/ntp/loss"] = -fmean(row.ntp_logprob for row in rows)
    reasoning = reasoning_accuracy(rows)
    if reasoning is not None:
        metrics |= {f"val/reasoning/{name}": value for name, value in reasoning.items()}
        metrics["val/boxed_frac"] = fmean(bool(row.boxed) for row in rows)
        metrics["val/truncated_frac"] = fmean(bool(row.truncated) for row in rows)
        metrics["val/length_mean"] = fmean(row.length or 0 for row in rows)
    return metrics


def _accuracy(rows: Sequence[PositionResult], correct: Sequence[bool]) -> dict[str, float]:
    metric = NextTokenAccuracy(sync_on_compute=False)  # the records already come from all ranks
    entropy = torch.tensor([row.entropy for row in rows], dtype=torch.float64)
    metric.update(torch.tensor(correct), entropy, torch.tensor([row.answerable for row in rows]))
    result: dict[str, float] = metric.compute()
    return result
