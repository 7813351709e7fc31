"""What a data module hands to the trainer: tasks, sequences, or held-out tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.types import Task, TrainBatch, TrainSequence


@dataclass(kw_only=True, slots=True)
class TaskBatch:
    """This rank's tasks of one step. The rollout callback adds their ``rollouts``.

    There are no tasks if the callback itself reads the stream, ahead of the training steps.
    """

    tasks: tuple[Task, ...] = ()
    rollouts: TrainBatch | None = None


@dataclass(kw_only=True, slots=True)
class SequenceBatch:
    """This rank's sequences of one step of next-token training."""

    sequences: tuple[TrainSequence, ...]


@dataclass(kw_only=True, slots=True)
class HeldOutBatch:
    """This rank's part of one validation batch.

    ``records`` is the form of the records that result from it (`Objective.records`). The rollout callback
    adds the objective, if one is configured, and the policy's ``answers``, one for each task.
    """

    tasks: tuple[Task, ...]
    records: Literal["positions", "questions"] = "positions"
    objective: BoundObjective | None = None
    answers: Sequence[Any] | None = None
