"""Questions with a verifiable answer: reinforcement fine-tuning after RPT (the paper's experiment on RLVR), and the benchmarks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.data.base_datamodule import EvalLoader, StreamDataModule
from rpt_lightning.data.questions import QuestionSource, read_all
from rpt_lightning.data.stream import ShuffledOrder, TaskStream
from rpt_lightning.tasks.question_text import question_text
from rpt_lightning.tasks.token_bytes import TokenBytes
from rpt_lightning.types import AnswerTask, Question


class AnswerTaskDataModule(StreamDataModule):
    """Training batches ``{"tasks": ...}`` hold this rank's share of a step, validation batches ``{"questions": ...}`` its share of the held-out questions.

    Questions are tokenised with the tokenizer of the model being trained; what looks like its markers is plain text.

    Args:
        train: Questions to learn from; None only where nothing is trained.
        heldout: Questions of a validation; None: there is none.
        tasks_per_step: Questions of one step, of all ranks together.
        max_question_tokens: Leave longer questions out of training; None: a question that does not fit is an error.
        num_eval_questions: So many of the held-out questions, drawn by the seed; None: all.
        eval_batch_size: Questions of one validation batch, of all ranks together. Results do not depend on it.
        seed: Of the order and of the choice of held-out questions.
        heldout_name: What results call the held-out questions.
    """

    positions_per_document = 1

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
        """Read and tokenise the questions. Raises ValueError for a broken source, and for a question that is in both parts."""
        assert self.trainer is not None
        token_bytes = TokenBytes(self.trainer.lightning_module.tokenizer)  # type: ignore[arg-type]
        heldout = () if self.heldout_source is None else read_all(self.heldout_source, flag="data.heldout")
        self.heldout = answer_tasks(choose(heldout, self.num_eval_questions, seed=self.seed), token_bytes)
        if stage != "fit":
            if not heldout:
                raise ValueError(
                    "--data.heldout is not set, so there are no questions to validate on; give a source, e.g. JsonlQuestions"
                )
            return
        if self.train_source is None:
            raise ValueError(
                "--data.train is not set, so there are no questions to learn from; give a source, e.g. JsonlQuestions"
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
                f"data: {len(tasks) - len(self.train)} of {len(tasks)} questions are longer than data.max_question_tokens={self.max_question_tokens} "
                "and are left out of training"
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
                self.heldout, batch_size=self.eval_batch_size, rank=rank, num_ranks=num_ranks, key="questions"
            )
            if self.heldout
            else []
        )

    def make_batch(self, items: list[tuple[int, int]]) -> dict[str, Any]:
        return {"tasks": tuple(self.train[question] for question, _ in items)}

    def draw(self, wanted: Sequence[int]) -> tuple[AnswerTask, ...]:
        """Further tasks for this rank (see ``draw_items``)."""
        return tuple(self.train[question] for question, _ in self.draw_items(wanted))


def answer_tasks(questions: Iterable[Question], token_bytes: TokenBytes) -> tuple[AnswerTask, ...]:
    """Questions as a model reads them. Raises ValueError for one that its tokenizer cannot express."""
    tasks = []
    for question in questions:
        try:
            context_ids = token_bytes.encode_plain(question_text(question))
        except ValueError as error:
            raise ValueError(f"question {question.question_id!r}: {error}") from error
        tasks.append(AnswerTask(question=question, context_ids=context_ids))
    return tuple(tasks)


def choose(questions: Sequence[Question], number: int | None, *, seed: int) -> tuple[Question, ...]:
    """So many of the questions, a function of the seed, in their own order; all where there are not more."""
    if number is None or number >= len(questions):
        return tuple(questions)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(questions))[:number])
    return tuple(questions[index] for index in chosen.tolist())


def _check_apart(train: Sequence[Question], heldout: Sequence[Question]) -> None:
    texts = {question.text: question.question_id for question in heldout}
    shared = [question for question in train if question.text in texts]
    if shared:
        raise ValueError(
            f"--data.heldout: {len(shared)} of its questions are in --data.train too ({texts[shared[0].text]!r} for one), so a validation would measure memory; "
            "remove them from one of the two"
        )


def _fingerprint(questions: Iterable[Question]) -> str:
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(asdict(question), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
