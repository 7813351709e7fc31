"""Cold start with traces in the answer format, made from the policy's own predictions."""

from __future__ import annotations

from pathlib import Path

from rpt_lightning.data.modules.base import TaskFolderDataModule
from rpt_lightning.data.modules.batch import SequenceBatch
from rpt_lightning.data.modules.stream import ShuffledOrder
from rpt_lightning.data.modules.trace_writer import TraceWriter
from rpt_lightning.objectives.prompts.template import PromptTemplate


class TraceDataModule(TaskFolderDataModule):
    """Serve cold-start traces, one per position.

    Training batches are `SequenceBatch`es.

    Args:
        task_dir: Folder made by ``rpt prepare``, with the policy's own starting weights as the proxy.
        prompt: Prompt template that the policy will be used with.
        traces_per_step: Traces in one step, over all ranks.
        positions_per_document: Number of positions of a document to train on together, if it has that many.
            They share their prefix.
        num_candidates: Number of the model's most likely next tokens that a thought names.
        only_answerable: Leave out candidates that the box parser would not return.
        allow_other_proxy: Accept another model's predictions as the policy's own.
        max_context_tokens: Truncate longer contexts on the left.
        num_eval_tasks: Number of held-out positions in a validation.
        eval_min_entropy: Validate only on positions whose proxy entropy exceeds this, in nats.
        eval_batch_size: Tasks in one validation batch, over all ranks. Only the results after shuffled
            thoughts depend on it.
        seed: Seed of the order, of the drawn answers and of the choice of held-out positions.
    """

    def __init__(
        self,
        task_dir: str,
        prompt: PromptTemplate,
        traces_per_step: int = 80,
        positions_per_document: int = 20,
        num_candidates: int = 3,
        only_answerable: bool = True,
        allow_other_proxy: bool = False,
        max_context_tokens: int | None = None,
        num_eval_tasks: int = 1024,
        eval_min_entropy: float = 0.5,
        eval_batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(
            task_dir,
            items_per_step=traces_per_step,
            flag="traces_per_step",
            max_context_tokens=max_context_tokens,
            num_eval_tasks=num_eval_tasks,
            eval_min_entropy=eval_min_entropy,
            eval_batch_size=eval_batch_size,
            seed=seed,
        )
        for name, value in [
            ("positions_per_document", positions_per_document),
            ("num_candidates", num_candidates),
        ]:
            if value < 1:
                raise ValueError(f"--data.{name} {value}: must be at least 1")
        self.prompt = prompt
        self.positions_per_document = positions_per_document
        self.num_candidates = num_candidates
        self.only_answerable = only_answerable
        self.allow_other_proxy = allow_other_proxy

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._check_proxy()
        self.writer = TraceWriter(
            self.prompt.bind(self.train.tokenizer),
            self.train.token_bytes,
            num_candidates=self.num_candidates,
            only_answerable=self.only_answerable,
            seed=self.seed,
        )

    def make_order(self) -> ShuffledOrder:
        return ShuffledOrder(
            self.train.num_positions,
            self.train.chunk_sizes,
            bundle_size=self.positions_per_document,
            seed=self.seed,
        )

    def make_batch(self, items: list[tuple[int, int]]) -> SequenceBatch:
        """Build a batch. A position gives no trace if none of its candidates can be an answer."""
        traces = []
        for document, k in items:
            task = self.train.task(document, k)
            traces.append(
                self.writer.write(task.task_id, task.context_ids, *self.train.candidates(document, k))
            )
        return SequenceBatch(sequences=tuple(trace for trace in traces if trace is not None))

    def _check_proxy(self) -> None:
        module = None if self.trainer is None else self.trainer.lightning_module
        policy_path = getattr(getattr(module, "policy", None), "path", None)
        proxy = self.train.manifest.proxy
        if policy_path is None or self.allow_other_proxy or _same_model(policy_path, proxy):
            return
        raise ValueError(
            f"--data.task_dir {self.task_dir}: scored by {proxy!r}, but the model being trained is "
            f"{policy_path!r}, so the traces would not be its own predictions; "
            "prepare a folder with --proxy set to that model, or set --data.allow_other_proxy true"
        )


def _same_model(left: str, right: str) -> bool:
    return left == right or (Path(left).exists() and Path(left).resolve() == Path(right).resolve())
