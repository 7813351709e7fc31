"""Next-token training straight from a corpus. It needs no scored task folder."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from rpt_lightning.data.modules.base import EvalLoader, StreamDataModule, ask_folder, check_tokenizer
from rpt_lightning.data.modules.batch import SequenceBatch
from rpt_lightning.data.modules.heldout import choose_heldout
from rpt_lightning.data.modules.stream import ShuffledOrder, TaskStream
from rpt_lightning.data.modules.worked_examples import ExampleWriter, Phase
from rpt_lightning.data.prepare.tokenized_corpus import document_bytes, read_documents
from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.prompts.template import PromptTemplate
from rpt_lightning.pretrained.token_bytes import TokenBytes, start_ids
from rpt_lightning.types import Document, TrainSequence


class CorpusDataModule(StreamDataModule):
    """Serve the documents of a corpus, and worked examples at their marked places, for next-token training.

    Training batches are `SequenceBatch`es. The documents are kept in memory
    and tokenized when they are used. Every token of a document except the first is a target.

    Args:
        source: Source of the text.
        documents_per_step: Documents in one step, over all ranks.
        prompt: Prompt template of the worked examples. null means no worked examples.
        objective: Objective that defines the worked examples, with its own prompt. ``prompt`` must then be
            null. With null, an example shows the text before the marked text.
        phases: Curriculum of the worked examples. It sets how many of them think, and at which depths.
        max_tokens: Truncate documents to this many tokens. null truncates to the longest
            input that the model supports.
        task_dir: Folder made by ``rpt prepare``, whose held-out positions are used for validation. null means
            no validation.
        num_eval_tasks: Number of held-out positions in a validation.
        eval_min_entropy: Validate only on positions whose proxy entropy exceeds this, in nats.
        eval_batch_size: Tasks in one validation batch, over all ranks.
        seed: Seed of the order and of the choice of worked examples that think.
    """

    def __init__(
        self,
        source: CorpusSource,
        documents_per_step: int = 64,
        prompt: PromptTemplate | None = None,
        objective: Objective | None = None,
        phases: list[Phase] | None = None,
        max_tokens: int | None = None,
        task_dir: str | None = None,
        num_eval_tasks: int = 1024,
        eval_min_entropy: float = 0.5,
        eval_batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(
            items_per_step=documents_per_step,
            flag="documents_per_step",
            seed=seed,
            num_eval_tasks=num_eval_tasks,
            eval_batch_size=eval_batch_size,
        )
        if prompt is not None and objective is not None:
            raise ValueError(
                "--data.prompt and --data.objective are both set, but an objective has its own prompt; "
                "set one of them to null"
            )
        if phases is not None and prompt is None and objective is None:
            raise ValueError(
                "--data.phases says how worked examples think, but --data.prompt is null, so there are none; "
                "give a prompt"
            )
        if phases is not None and not phases:
            raise ValueError(
                "--data.phases []: give at least one phase, or null for worked examples that all think"
            )
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(
                f"--data.max_tokens {max_tokens}: must be at least 2, since the first token is not a target"
            )
        self.source = source
        self.prompt = prompt if objective is None else objective.prompt
        self.objective = objective
        self.phases = phases or [Phase()]
        self.max_tokens = max_tokens
        self.task_dir = task_dir
        self.num_eval_tasks = num_eval_tasks
        self.eval_min_entropy = eval_min_entropy
        self.eval_batch_size = eval_batch_size

    def setup(self, stage: str) -> None:
        """Read the corpus.

        Raises ValueError if the corpus is empty, if worked examples are wanted but no mark has a thought, or
        if the model being trained has a different tokenizer from the task folder.
        """
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        assert module is not None, "the tokenizer is that of the model being trained"
        tokenizer = module.tokenizer
        self.token_bytes = TokenBytes(tokenizer)
        self.start_ids = start_ids(tokenizer)
        self.documents: list[Document] = list(read_documents(self.source))
        if not self.documents:
            raise ValueError(f"--data.source: the corpus is empty ({self.source.describe()})")
        self.writer = None
        if self.prompt is not None:
            self.writer = ExampleWriter(
                self.prompt.bind(tokenizer),
                self.token_bytes,
                self.phases,
                seed=self.seed,
                objective=None if self.objective is None else self.objective.bind(tokenizer),
            )
            if not any(mark.thought is not None for document in self.documents for mark in document.marks):
                raise ValueError(
                    f"--data.prompt: worked examples need marks with thoughts, and no document of "
                    f"{type(self.source).__name__} has one; "
                    "set --data.prompt null or name a source that has them"
                )
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document_bytes(document))
        order = ShuffledOrder(
            np.ones(len(self.documents), np.int32), [len(self.documents)], bundle_size=1, seed=self.seed
        )
        self.begin_stream(
            TaskStream(order, corpus=digest.hexdigest()), f"the corpus ({type(self.source).__name__})"
        )
        self.heldout = None if self.task_dir is None else TaskFolder(self.task_dir, "heldout")
        if self.heldout is not None:
            check_tokenizer(self.heldout, module, task_dir=str(self.task_dir))

    def make_batch(self, items: list[tuple[int, int]]) -> SequenceBatch:
        """Build a batch. A document's worked examples follow it, so that they share their beginning."""
        place = self.stream.place
        step = (place.epoch * self.stream.order.items_per_epoch + place.index) // self.items_per_step - 1
        limit, sequences = self.max_tokens or self._num_positions(), list[TrainSequence]()
        for number, _ in items:
            document = self.documents[number]
            if self.writer is None or self.writer.phase(step).text:
                ids = (self.start_ids + self.token_bytes.encode_plain(document.text))[:limit]
                sequences.append(TrainSequence(prompt_ids=ids[:1], target_ids=ids[1:]))
            if self.writer is not None:
                sequences += self.writer.write(document, step=step)
        return SequenceBatch(sequences=tuple(sequences))

    def use_objective(self, objective: Objective) -> None:
        if self.heldout is not None:
            ask_folder(self.heldout, objective, task_dir=str(self.task_dir))

    def val_dataloader(self) -> EvalLoader:
        rank, num_ranks = self._data_rank()
        tasks = (
            ()
            if self.heldout is None
            else choose_heldout(
                self.heldout, num_tasks=self.num_eval_tasks, min_entropy=self.eval_min_entropy, seed=self.seed
            )
        )
        return EvalLoader(tasks, batch_size=self.eval_batch_size, rank=rank, num_ranks=num_ranks)
