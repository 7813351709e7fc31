"""Checks that all prompts fit, and computes the engine's context length.

The check runs before the first step, not when the longest prompt is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rpt_lightning.data.answer_datamodule import AnswerTaskDataModule
from rpt_lightning.data.base_datamodule import TaskFolderDataModule
from rpt_lightning.data.task_folder import TaskFolder
from rpt_lightning.tasks.prompt import BoundPrompt
from rpt_lightning.types import Task

# Tokens of a forced thought's prompt (closing marker and beginning of the box) and of its answer
# (rollout/forced_answer.py).
CONTROL_TOKENS = 64


def max_model_len(needed: int, *, positions: int | None, with_controls: bool) -> int:
    """Tokens of prompt and completion together for which the engine is started.

    Args:
        needed: Tokens of the longest prompt and completion.
        positions: Positions of the model. None for models without a limit.
        with_controls: Whether to add room for thought controls, as far as the model has the positions.
    """
    wanted = needed + CONTROL_TOKENS if with_controls else needed
    return wanted if positions is None else max(needed, min(wanted, positions))


def longest_context(folder: TaskFolder) -> int:
    """Tokens of the longest context in the folder."""
    longest = folder.last_position
    return longest if folder.max_context_tokens is None else min(longest, folder.max_context_tokens)


def check_training_prompts(data: Any, prompt: BoundPrompt, *, max_prompt_tokens: int) -> None:
    """Raise ValueError if a prompt of the training data is too long."""
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
    """Raise ValueError if a held-out prompt is too long. A user's own data module is not checked."""
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
            f"--rollout.max_prompt_tokens {max_prompt_tokens}: the longest context of {where} has "
            f"{context_tokens} tokens, and the prompt template adds {overhead}; raise it to "
            f"{context_tokens + overhead}, or {remedy.format(room=max(1, max_prompt_tokens - overhead))}"
        )
