"""A corpus of a run's own right completions, so that thoughts become text to be predicted by thinking.

The truth of such text is the model's own sample. A policy that learns to predict it may only become surer of
what it already writes (docs/recursion.md).

It is here and not in data/sources/, because it reads what a run leaves behind.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.rewards.next_token import prefix_match
from rpt_lightning.records.rollout_samples import RolloutSample, read_samples, sample_files
from rpt_lightning.records.run_folder import CONFIG_FILE, ROLLOUT_FOLDER
from rpt_lightning.types import Document, Mark

FLAG = "--source.init_args"
PART = "part"  # the field that says what a token belongs to: context, thought, answer, or the text held out
TEMPLATE = "{context}{thought}{answer}"
PARTS = ("context", "thought", "answer")
_BROKEN = "\ufffd"


class OwnTraces(CorpusSource):
    """The right completions of a run, and the documents that were held out from it.

    All completions are used for training. Each of them comes from a document that the run trained on, so none
    may become held-out text. The held-out documents of the run's task folder stay held out, so the same text
    measures the run, its continuation on these tasks, and any control.

    A completion is right if its prediction is the true continuation up to a token boundary.

    Args:
        run: Folder of a run. Its samples (``--samples.every_n_steps``) are read.
        task_dir: Task folder of the run. None takes it from the run's configuration.
        template: The text of a document, made of {context}, {thought} and {answer}.
        context_tokens: Maximum number of tokens of the context, counted from its end.
        max_per_task: Maximum number of completions of a task. The latest are kept, and equal ones count once.
        min_reward: Select completions with at least this reward instead of right ones, for runs whose
            predictions are right in another sense.
        think_close: Marker that ends a thought, as in the run's prompt. The text leaves it out. None takes
            all text before the box.
    """

    def __init__(
        self,
        run: str,
        task_dir: str | None = None,
        template: str = TEMPLATE,
        context_tokens: int = 200,
        max_per_task: int = 1,
        min_reward: float | None = None,
        think_close: str | None = "</think>",
    ) -> None:
        for name, value, least in (("context_tokens", context_tokens, 0), ("max_per_task", max_per_task, 1)):
            if value < least:
                raise ValueError(f"{FLAG}.{name} {value}: give {least} or more")
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if "thought" not in names or not set(names) <= set(PARTS):
            raise ValueError(
                f"{FLAG}.template {template!r}: it is made of {{{'}, {'.join(PARTS)}}}, and {{thought}} has "
                "to be among them"
            )
        self.run = run
        self.task_dir = task_dir
        self.template = template
        self.context_tokens = context_tokens
        self.max_per_task = max_per_task
        self.min_reward = min_reward
        self.think_close = think_close

    def documents(self) -> Iterator[Document]:
        """Yield the held-out documents, then the completions, by task."""
        files = sample_files(Path(self.run))
        if not files:
            raise ValueError(
                f"{FLAG}.run {self.run!r}: there are no completions in {Path(self.run) / ROLLOUT_FOLDER}; "
                "name a run of RPTModule, which writes some of them (--samples.every_n_steps 1: all)"
            )
        task_dir = self._task_dir()
        train, heldout = TaskFolder(task_dir, "train"), TaskFolder(task_dir, "heldout")
        kept, num_read = self._kept(files)
        if not kept:
            wanted = "is right" if self.min_reward is None else f"earned {self.min_reward} or more"
            raise ValueError(
                f"{FLAG}.run {self.run!r}: none of the {num_read} completions in {ROLLOUT_FOLDER}/ {wanted}, "
                "so there is nothing to learn from; name a run that solves some of its tasks"
            )
        of_document = {train.document(index)["doc_id"]: index for index in range(len(train))}
        held_out = {heldout.document(index)["doc_id"] for index in range(len(heldout))}
        for task_id in kept:
            self._check_origin(_origin(task_id), of_document, held_out, task_dir)
        for index in range(len(heldout)):
            yield Document(
                doc_id=heldout.document(index)["doc_id"],
                text=heldout.token_bytes.join(heldout.token_ids(index)).decode(errors="ignore"),
                fields={PART: "text"},
                split="heldout",
            )
        for task_id, rows in kept.items():
            position = int(task_id.rpartition(":")[2])
            token_ids = train.token_ids(of_document[_origin(task_id)])[:position]
            start = max(0, position - self.context_tokens)
            try:
                context = _without_first_part(train.token_bytes.join(token_ids[start:])).decode()
            except UnicodeDecodeError:  # the position lies inside a character
                continue
            for step, row in rows:
                yield self._document(f"{task_id}@{step}", context, row)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "own_traces",
            "run": self.run,
            "task_dir": self.task_dir,
            "template": self.template,
            "context_tokens": self.context_tokens,
            "max_per_task": self.max_per_task,
            "min_reward": self.min_reward,
            "think_close": self.think_close,
        }

    def _task_dir(self) -> str:
        if self.task_dir is not None:
            return self.task_dir
        path = Path(self.run) / CONFIG_FILE
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["init_args"]["task_dir"]
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ValueError(
                f"{FLAG}.task_dir is not set, and {path} does not name the run's task folder "
                f"({type(error).__name__}: {error}); give the folder that the run trained on"
            ) from error
        return str(found)

    def _kept(self, files: dict[int, Path]) -> tuple[dict[str, list[tuple[int, RolloutSample]]], int]:
        """Return the latest different right completions of each task with their steps, and how many exist."""
        latest: dict[str, dict[tuple[str, str | None], tuple[int, RolloutSample]]] = {}
        num_read = 0
        for step, path in files.items():
            for row in read_samples(path):
                num_read += 1
                if self._is_wanted(row):
                    rows = latest.setdefault(row.task_id, {})
                    key = (self._thought(row), row.prediction)
                    rows.pop(key, None)  # a later one of the same text takes its place at the end
                    rows[key] = (step, row)
        # Groups may share an optimizer step, but equal steps keep the order of the file.
        return {task: list(rows.values())[-self.max_per_task :] for task, rows in latest.items()}, num_read

    def _is_wanted(self, row: RolloutSample) -> bool:
        if row.prediction is None or _BROKEN in row.completion:
            return False
        if self.min_reward is not None:
            return row.reward >= self.min_reward
        return prefix_match(row.prediction.encode(), [piece.encode() for piece in row.truth]) == 1.0

    def _thought(self, row: RolloutSample) -> str:
        if self.think_close is None:
            return row.thought
        thought, marker, _ = row.thought.rpartition(self.think_close)
        return thought if marker else row.thought

    def _check_origin(
        self, origin: str, of_document: dict[str, int], held_out: set[str], task_dir: str
    ) -> None:
        """Raise ValueError unless the run trained on the document."""
        if origin in of_document:
            return
        where = "holds it out" if origin in held_out else "does not have it"
        raise ValueError(
            f"{FLAG}.task_dir {task_dir}: the run {self.run} has completions about the document {origin!r}, "
            f"but this folder {where}; give the folder that the run trained on, since completions stay on "
            "the side of the documents that they came from"
        )

    def _document(self, doc_id: str, context: str, row: RolloutSample) -> Document:
        assert row.prediction is not None
        parts = {"context": context, "thought": self._thought(row), "answer": row.prediction}
        text, marks = "", []
        for words, name, _, _ in string.Formatter().parse(self.template):
            text += words
            if name is not None and parts[name]:
                marks.append(Mark(start=len(text), end=len(text) + len(parts[name]), fields={PART: name}))
                text += parts[name]
        return Document(doc_id=doc_id, text=text, marks=tuple(marks), split="train")


def _origin(task_id: str) -> str:
    return task_id.rpartition(":")[0]


def _without_first_part(text: bytes) -> bytes:
    """Leave out the rest of a character that begins before the text.

    >>> _without_first_part("é!".encode()[1:])
    b'!'
    """
    start = 0
    while start < min(3, len(text)) and text[start] & 0xC0 == 0x80:
        start += 1
    return text[start:]
