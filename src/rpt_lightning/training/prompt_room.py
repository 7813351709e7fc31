"""Room for prompts: whether all of the data fit, said before the first step rather than when the longest is drawn, and what the engine needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rpt_lightning.data.answer_datamodule import AnswerTaskDataModule
from rpt_lightning.data.base_datamodule import TaskFolderDataModule
from rpt_lightning.data.task_folder import TaskFolder
from rpt_lightning.tasks.prompt import BoundPrompt
from rpt_lightning.types import Task

CONTROL_TOKENS = 64  # of a forced thought's prompt: the closing marker and the box's beginning, and an answer (rollout/forced_answer.py)


def max_model_len(needed: int, *, positions: int | None, with_controls: bool) -> int:
    """Tokens of prompt and completion that an engine is started for: ``needed``, and some more for thought controls where the model has the positions.

    ``positions`` is None for models without a limit.
    """
    wanted = needed + CONTROL_TOKENS if with_controls else needed
    return wanted if positions is None else max(needed, min(wanted, positions))


def longest_context(folder: TaskFolder) -> int:
    """Tokens of the longest context that the folder can give."""
    longest = folder.last_position
    return longest if folder.max_context_tokens is None else min(longest, folder.max_context_tokens)


def check_training_prompts(data: Any, prompt: BoundPrompt, *, max_prompt_tokens: int) -> None:
    """Raises ValueError where a prompt of the training data is too long."""
    if isinstance(data, AnswerTaskDataModule):
        remedy = "leave longer questions out with --data.max_question_tokens {room}"
        _check(
            _longest(data.train),
            prompt,
            max_prompt_tokens=max_prompt_tokens,
            where="the questions of --data.train",
            remedy=remedy,
        )
    else:
        _check(
            longest_context(data.train),
            prompt,
            max_prompt_tokens=max_prompt_tokens,
            where=f"{data.task_dir}, train",
        )


def check_validation_prompts(data: Any, prompt: BoundPrompt, *, max_prompt_tokens: int) -> None:
    """Raises ValueError where a held-out prompt is too long. A user's own data module is not looked at."""
    if isinstance(data, AnswerTaskDataModule):
        remedy = "take longer questions out of --data.heldout"
        _check(
            _longest(data.heldout),
            prompt,
            max_prompt_tokens=max_prompt_tokens,
            where="the questions of --data.heldout",
            remedy=remedy,
        )
    elif isinstance(data, TaskFolderDataModule):
        _check(
            _longest(data.eval_tasks()),
            prompt,
            max_prompt_tokens=max_prompt_tokens,
            where=f"{data.task_dir}, heldout",
        )


def _longest(tasks: Sequence[Task]) -> int:
    return max(len(task.context_ids) for task in tasks)


def _check(
    context_tokens: int,
    prompt: BoundPrompt,
    *,
    max_prompt_tokens: int,
    where: str,
    remedy: str = "cut contexts with --data.max_context_tokens {room}",
) -> None:
    overhead = prompt.num_overhead_tokens
    if context_tokens + overhead > max_prompt_tokens:
        raise ValueError(
            f"--rollout.max_prompt_tokens {max_prompt_tokens}: the longest context of {where} has {context_tokens} tokens, and the prompt template adds "
            f"{overhead}; raise it to {context_tokens + overhead}, or {remedy.format(room=max(1, max_prompt_tokens - overhead))}"
        )
