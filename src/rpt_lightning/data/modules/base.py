"""The base classes of all data modules.

Every data module reads one global stream, whose place a checkpoint carries, and one fixed set of held-out
tasks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from rpt_lightning.compat.lightning import data_rank
from rpt_lightning.data.modules.batch import HeldOutBatch, SequenceBatch, TaskBatch
from rpt_lightning.data.modules.heldout import choose_heldout
from rpt_lightning.data.modules.stream import Order, Place, TaskStream, rank_share
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.base import Objective
from rpt_lightning.pretrained.specification import has_hash, is_whole
from rpt_lightning.pretrained.text_shape import longest_context
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Task, TokenTask

# For folders that were written before their hash covered the whole tokenizer.
NUM_COMPARED_DOCUMENTS, NUM_CUT_TOKENS = 64, 16


class StepLoader:
    """Make each training batch on demand, in the main process.

    The stream's place is therefore always that of the last step. The loader never ends by itself. It has a
    length because Lightning otherwise fetches one batch ahead. Lightning neither rewinds nor fast-forwards
    it when a run resumes, since the place comes from the data module's own state.
    """

    def __init__(self, next_batch: Callable[[], Any], num_steps: int) -> None:
        self.next_batch = next_batch
        self.num_steps = num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.next_batch()

    # Without these two Lightning warns that the run cannot be resumed.

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class EvalLoader:
    """Batches of the held-out tasks.

    Every rank sees the same number of batches. The last batch may be empty on some ranks.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        batch_size: int,
        rank: int,
        num_ranks: int,
        records: Literal["positions", "questions"] = "positions",
    ) -> None:
        batches = [tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size)]
        self.shares = [tuple(rank_share(batch, rank=rank, num_ranks=num_ranks)) for batch in batches]
        self.records = records

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[HeldOutBatch]:
        return (HeldOutBatch(tasks=share, records=self.records) for share in self.shares)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextLimit:
    """The longest context of some tasks in tokens, where they are, and how a user can shorten it.

    ``remedy`` has a slot ``{room}`` for the number of tokens that fit.
    """

    tokens: int
    where: str
    remedy: str


class StreamDataModule(LightningDataModule):
    """Train on the items of ``stream``, which ``setup`` creates, and carry the stream's place."""

    makes: ClassVar[Literal["tasks", "sequences"]] = "sequences"  # what training batches hold
    positions_per_document = 1
    heldout_name = "held-out positions"
    stream: TaskStream
    _trained: Place | None  # the place after what has been trained, if the stream is read ahead

    def __init__(self, *, items_per_step: int, flag: str, seed: int, **at_least_one: int | None) -> None:
        super().__init__()
        for name, value in {flag: items_per_step, **at_least_one}.items():
            if value is not None and value < 1:
                raise ValueError(f"--data.{name} {value}: must be at least 1")
        self.items_per_step = items_per_step
        self.flag = flag
        self.seed = seed

    @abstractmethod
    def make_batch(self, items: list[tuple[int, int]]) -> TaskBatch | SequenceBatch:
        """Build the training batch from some ``(document, k)`` pairs of the order."""

    def begin_stream(self, stream: TaskStream, where: str) -> None:
        """Start a new stream. Raises ValueError if a step has more items than one epoch of the stream."""
        self.stream = stream
        self._trained = None
        available = self.stream.order.items_per_epoch
        if self.items_per_step > available:
            raise ValueError(
                f"--data.{self.flag} {self.items_per_step}: {where} has only {available} to train on, "
                "so a step would repeat some; lower it or give more"
            )

    # What a run's objective needs

    def use_objective(self, objective: Objective) -> None:
        """Prepare for a run with this objective, after ``setup``.

        Raises ValueError if the data has no tasks for it.
        """

    def context_limit(self, split: Literal["train", "heldout"]) -> ContextLimit | None:
        """Return the longest context of a split. None if there are no tasks."""
        return None

    def known_tasks(self) -> Sequence[Task]:
        """Return the tasks that are in memory before the run starts."""
        return ()

    # Lightning's hooks

    def train_dataloader(self) -> StepLoader:
        return StepLoader(
            self._next_batch, num_steps=self.stream.order.items_per_epoch // self.items_per_step
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch as it is: it holds no tensors, and Lightning's walk rejects frozen dataclasses."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(self._trained)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # a validation may read a different folder from the run that wrote the checkpoint
        self.stream.load_state_dict(state_dict["stream"])

    def draw(self, wanted: Sequence[int]) -> tuple[Task, ...]:
        """Draw further tasks for this rank (see ``draw_items``)."""
        raise NotImplementedError(f"{type(self).__name__} makes no tasks")

    def draw_items(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """Draw further items of the same stream, for dynamic sampling.

        ``wanted[r]`` is the number for data-parallel rank r. Each rank gets its own items. The next step
        continues after them. Every rank makes the same call, so that all ranks stay at the same place.
        """
        rank, num_ranks = self._data_rank()
        assert len(wanted) == num_ranks
        drawn = self.stream.next(sum(wanted))
        start = sum(wanted[:rank])
        return drawn[start : start + wanted[rank]]

    # For callers that read ahead of the steps

    def next_batch(self) -> TaskBatch | SequenceBatch:
        """Return this rank's part of the step after everything drawn so far."""
        rank, num_ranks = self._data_rank()
        self.stream.begin_step()
        return self.make_batch(
            list(rank_share(self.stream.next(self.items_per_step), rank=rank, num_ranks=num_ranks))
        )

    def trained_up_to(self, place: Place) -> None:
        """Set the place that a checkpoint holds from now on.

        Items drawn after ``place`` have not been trained yet, so a resumed run draws them again. The first
        call gives the caller control of the stream: it may then read the stream in another thread, and the
        loader's own batches are empty.
        """
        self._trained = place

    def _next_batch(self) -> TaskBatch | SequenceBatch:
        if self._trained is not None:
            return TaskBatch()
        return self.next_batch()

    def _num_positions(self) -> int | None:
        """Longest context of the model being trained, in tokens. None if unlimited or outside a Trainer."""
        policy = None if self.trainer is None else getattr(self.trainer.lightning_module, "policy", None)
        return None if policy is None else longest_context(policy.config)

    def _data_rank(self) -> tuple[int, int]:
        """This process's data-parallel rank and the number of such ranks.

        Tensor-parallel ranks of one group get identical tasks.
        """
        return data_rank(getattr(self.trainer, "strategy", None))


class TaskFolderDataModule(StreamDataModule):
    """Train on the ``train`` split of a task folder and validate on fixed held-out positions.

    ``stream.py`` defines the order of training.
    """

    def __init__(
        self,
        task_dir: str,
        *,
        items_per_step: int,
        flag: str,
        max_context_tokens: int | None,
        num_eval_tasks: int,
        eval_min_entropy: float,
        eval_batch_size: int,
        seed: int,
    ) -> None:
        super().__init__(
            items_per_step=items_per_step,
            flag=flag,
            seed=seed,
            num_eval_tasks=num_eval_tasks,
            eval_batch_size=eval_batch_size,
            max_context_tokens=max_context_tokens,
        )
        self.task_dir = task_dir
        self.max_context_tokens = max_context_tokens
        self.num_eval_tasks = num_eval_tasks
        self.eval_min_entropy = eval_min_entropy
        self.eval_batch_size = eval_batch_size

    @abstractmethod
    def make_order(self) -> Order:
        """Return the order of this module's items. ``self.train`` is already open."""

    # Lightning's hooks

    def setup(self, stage: str) -> None:
        """Open and check the task folder.

        Raises ValueError if the model being trained has a different tokenizer.
        """
        self.train = TaskFolder(self.task_dir, "train", max_context_tokens=self.max_context_tokens)
        self.heldout = TaskFolder(self.task_dir, "heldout", max_context_tokens=self.max_context_tokens)
        module = None if self.trainer is None else self.trainer.lightning_module
        self.train.carries_rest = getattr(module, "trains_whole_documents", False)
        self._check_tokenizer()
        stream = TaskStream(
            self.make_order(), corpus=self.train.manifest.corpus.sha256, layout=self.train.layout
        )
        self.begin_stream(stream, self.task_dir)

    def val_dataloader(self) -> EvalLoader:
        rank, num_ranks = self._data_rank()
        return EvalLoader(self.eval_tasks(), batch_size=self.eval_batch_size, rank=rank, num_ranks=num_ranks)

    # What a run's objective needs

    def use_objective(self, objective: Objective) -> None:
        for folder in (self.train, self.heldout):
            ask_folder(folder, objective, task_dir=self.task_dir)

    def context_limit(self, split: Literal["train", "heldout"]) -> ContextLimit:
        tokens = (
            _longest_context(self.train)
            if split == "train"
            else max(len(task.context_ids) for task in self.eval_tasks())
        )
        return ContextLimit(
            tokens=tokens,
            where=f"{self.task_dir}, {split}",
            remedy="cut contexts with --data.max_context_tokens {room}",
        )

    # Also used for evaluation outside a Trainer

    def eval_tasks(self) -> tuple[TokenTask, ...]:
        """Return the held-out tasks of all ranks."""
        return choose_heldout(
            self.heldout, num_tasks=self.num_eval_tasks, min_entropy=self.eval_min_entropy, seed=self.seed
        )

    def _check_tokenizer(self) -> None:
        check_tokenizer(
            self.train,
            None if self.trainer is None else self.trainer.lightning_module,
            task_dir=self.task_dir,
        )


def ask_folder(folder: TaskFolder, objective: Objective, *, task_dir: str) -> None:
    """Make the folder's tasks fit an objective. Raises ValueError if it was prepared for another one."""
    if objective.places != folder.places:
        raise ValueError(
            f"--data.task_dir {task_dir}: prepared for {folder.places}, but {type(objective).__name__} asks "
            f"about {objective.places}; prepare a folder with rpt prepare --objective "
            f"{type(objective).__name__}, or give another objective"
        )
    if objective.num_truth_tokens > folder.manifest.answer_reach:
        raise ValueError(
            f"--data.task_dir {task_dir}: prepared with --answer_reach {folder.manifest.answer_reach}, but "
            f"right answers of {type(objective).__name__} are found within {objective.num_truth_tokens} "
            "tokens; prepare a folder with that --answer_reach, or set the objective to shorter answers"
        )
    folder.num_following_tokens = objective.num_following_tokens


def _longest_context(folder: TaskFolder) -> int:
    """Tokens of the longest context in the folder, after truncation."""
    longest = folder.last_position
    return longest if folder.max_context_tokens is None else min(longest, folder.max_context_tokens)


def check_tokenizer(folder: TaskFolder, module: Any, *, task_dir: str) -> None:
    """Check that the model being trained has the task folder's tokenizer. Raises ValueError if it does not.

    A module of the user's own may have no tokenizer. It then passes.
    """
    wanted = getattr(module, "tokenizer_hash", None)
    if wanted is not None and wanted != folder.tokenizer_hash and not _tokenizes_alike(folder, module):
        raise ValueError(
            f"--data.task_dir {task_dir}: prepared with the tokenizer of {folder.manifest.tokenizer!r}, "
            "which is not that of the model being trained; prepare the folder with this model's tokenizer "
            "or train that model"
        )


def _tokenizes_alike(folder: TaskFolder, module: Any) -> bool:
    """Whether the module's tokenizer gives the tokens of a folder whose hash covers only part of a tokenizer.

    The folder's tokenizer was written by the class that transformers built from it, which may describe the
    same tokenizer differently. The last tokens of a truncated document are not compared, since they may be
    the beginning of another token.
    """
    stored_hash, tokenizer = folder.manifest.tokenizer_hash, getattr(module, "tokenizer", None)
    if is_whole(stored_hash) or tokenizer is None or not has_hash(tokenizer, stored_hash):
        return False
    encode, join = TokenBytes(tokenizer).encode_plain, folder.token_bytes.join
    for index in range(min(len(folder), NUM_COMPARED_DOCUMENTS)):
        stored = folder.token_ids(index)
        text = join(stored).decode("utf-8", errors="ignore")
        sure = max(1, len(stored) - NUM_CUT_TOKENS)
        if encode(text)[:sure] != stored[:sure]:
            return False
    return True
