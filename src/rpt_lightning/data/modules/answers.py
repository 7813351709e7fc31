"""Questions with a verifiable answer.

They serve reinforcement fine-tuning after RPT (the paper's RLVR experiment) and the benchmarks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.data.modules.base import ContextLimit, EvalLoader, StreamDataModule
from rpt_lightning.data.modules.batch import TaskBatch
from rpt_lightning.data.modules.stream import ShuffledOrder, TaskStream
from rpt_lightning.data.sources.questions import QuestionSource, read_all
from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.question import PLACES
from rpt_lightning.objectives.question_text import question_text
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import AnswerTask, Question


class AnswerTaskDataModule(StreamDataModule):
    """Serve questions with verifiable answers for training and validation.

    Training batches are `TaskBatch`es and validation batches `HeldOutBatch`es. Questions are tokenised with
    the tokenizer of the model being trained. Text that looks like one of its markers is encoded as plain
    text.

    Args:
        train: Questions to train on. None is allowed only if nothing is trained.
        heldout: Questions to validate on. None means no validation.
        tasks_per_step: Questions in one step, over all ranks.
        max_question_tokens: Leave longer questions out of training. None keeps all questions, and one that
            does not fit is then an error.
        num_eval_questions: Validate on this many held-out questions, drawn with the seed. None uses all.
        eval_batch_size: Questions in one validation batch, over all ranks. It does not affect the results.
        seed: Seed of the order and of the choice of held-out questions.
        heldout_name: Name of the held-out questions in the results.
    """

    makes = "tasks"

    def __init__(
        self,
        train: QuestionSource | None = None,
        heldout: QuestionSource | None = None,
        tasks_per_step: int = 64,
        max_question_tokens: int | None = None,
        num_eval_questions: int | None = None,
        eval_batch_size: int = 256,
        seed: int = 0,
        heldout_name: str = "held-out questions",
    ) -> None:
        super().__init__(
            items_per_step=tasks_per_step,
            flag="tasks_per_step",
            seed=seed,
            max_question_tokens=max_question_tokens,
            num_eval_questions=num_eval_questions,
            eval_batch_size=eval_batch_size,
        )
        self.train_source = train
        self.heldout_source = heldout
        self.max_question_tokens = max_question_tokens
        self.num_eval_questions = num_eval_questions
        self.eval_batch_size = eval_batch_size
        self.heldout_name = heldout_name
        self.train: tuple[AnswerTask, ...] = ()
        self.heldout: tuple[AnswerTask, ...] = ()

    # Lightning's hooks

    def setup(self, stage: str) -> None:
        """Read and tokenise the questions.

        Raises ValueError if a source is broken or if a question is in both parts.
        """
        assert self.trainer is not None
        token_bytes = TokenBytes(self.trainer.lightning_module.tokenizer)  # type: ignore[arg-type]
        heldout = () if self.heldout_source is None else read_all(self.heldout_source, flag="data.heldout")
        self.heldout = answer_tasks(choose(heldout, self.num_eval_questions, seed=self.seed), token_bytes)
        if stage != "fit":
            if not heldout:
                raise ValueError(
                    "--data.heldout is not set, so there are no questions to validate on; "
                    "give a source, e.g. JsonlQuestions"
                )
            return
        if self.train_source is None:
            raise ValueError(
                "--data.train is not set, so there are no questions to learn from; "
                "give a source, e.g. JsonlQuestions"
            )
        questions = read_all(self.train_source, flag="data.train")
        _check_apart(questions, heldout)
        tasks = answer_tasks(questions, token_bytes)
        self.train = tuple(
            task
            for task in tasks
            if self.max_question_tokens is None or len(task.context_ids) <= self.max_question_tokens
        )
        if len(self.train) < len(tasks):
            rank_zero_info(
                f"data: {len(tasks) - len(self.train)} of {len(tasks)} questions are longer than "
                f"data.max_question_tokens={self.max_question_tokens} and are left out of training"
            )
        order = ShuffledOrder(
            np.ones(len(self.train), np.int32), [len(self.train)], bundle_size=1, seed=self.seed
        )
        self.begin_stream(
            TaskStream(order, corpus=_fingerprint(task.question for task in self.train)), "--data.train"
        )

    def val_dataloader(self) -> EvalLoader | list[Any]:
        rank, num_ranks = self._data_rank()
        return (
            EvalLoader(
                self.heldout,
                batch_size=self.eval_batch_size,
                rank=rank,
                num_ranks=num_ranks,
                records="questions",
            )
            if self.heldout
            else []
        )

    # What a run's objective needs

    def use_objective(self, objective: Objective) -> None:
        if objective.places != PLACES:
            raise ValueError(
                f"--data AnswerTaskDataModule serves questions, and {type(objective).__name__} asks about "
                f"{objective.places}; give --rollout.objective QuestionObjective, or another --data"
            )

    def context_limit(self, split: Literal["train", "heldout"]) -> ContextLimit | None:
        tasks = self.train if split == "train" else self.heldout
        if not tasks:
            return None
        remedy = (
            "leave longer questions out with --data.max_question_tokens {room}"
            if split == "train"
            else "take longer questions out of --data.heldout"
        )
        return ContextLimit(
            tokens=max(len(task.context_ids) for task in tasks),
            where=f"the questions of --data.{split}",
            remedy=remedy,
        )

    def known_tasks(self) -> tuple[AnswerTask, ...]:
        return self.train + self.heldout

    # The stream

    def make_batch(self, items: list[tuple[int, int]]) -> TaskBatch:
        return TaskBatch(tasks=tuple(self.train[question] for question, _ in items))

    def draw(self, wanted: Sequence[int]) -> tuple[AnswerTask, ...]:
        """Draw further tasks for this rank (see ``draw_items``)."""
        return tuple(self.train[question] for question, _ in self.draw_items(wanted))


def answer_tasks(questions: Iterable[Question], token_bytes: TokenBytes) -> tuple[AnswerTask, ...]:
    """Tokenise questions for a model. Raises ValueError if its tokenizer cannot express one of them."""
    tasks = []
    for question in questions:
        try:
            context_ids = token_bytes.encode_plain(question_text(question))
        except ValueError as error:
            raise ValueError(f"question {question.question_id!r}: {error}") from error
        tasks.append(AnswerTask(question=question, context_ids=context_ids))
    return tuple(tasks)


def choose(questions: Sequence[Question], number: int | None, *, seed: int) -> tuple[Question, ...]:
    """Choose ``number`` questions with the seed and keep their order. Returns all if there are no more."""
    if number is None or number >= len(questions):
        return tuple(questions)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(questions))[:number])
    return tuple(questions[index] for index in chosen.tolist())


def _check_apart(train: Sequence[Question], heldout: Sequence[Question]) -> None:
    texts = {question.text: question.question_id for question in heldout}
    shared = [question for question in train if question.text in texts]
    if shared:
        raise ValueError(
            f"--data.heldout: {len(shared)} of its questions are in --data.train too "
            f"({texts[shared[0].text]!r} for one), so a validation would measure memory; "
            "remove them from one of the two"
        )


def _fingerprint(questions: Iterable[Question]) -> str:
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(asdict(question), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
