"""Room for prompts: whether all of a task folder fit, said before the first step rather than when the longest is drawn, and what the engine needs."""

from __future__ import annotations

from rpt_lightning.data.task_folder import TaskFolder
from rpt_lightning.tasks.prompt import BoundPrompt

CONTROL_TOKENS = 64  # of a forced thought's prompt: the closing marker and the box's beginning, and an answer (rollout/thought_controls.py)


def max_model_len(needed: int, *, positions: int, with_controls: bool) -> int:
    """Tokens of prompt and completion that an engine is started for: ``needed``, and some more for thought controls where the model has the positions."""
    return max(needed, min(needed + CONTROL_TOKENS, positions)) if with_controls else needed


def longest_context(folder: TaskFolder) -> int:
    """Tokens of the longest context that the folder can give."""
    longest = folder.last_position
    return longest if folder.max_context_tokens is None else min(longest, folder.max_context_tokens)


def check_prompts_fit(context_tokens: int, prompt: BoundPrompt, *, max_prompt_tokens: int, where: str) -> None:
    """Raises ValueError where the prompt of a context of so many tokens is too long."""
    overhead = prompt.num_overhead_tokens
    if context_tokens + overhead > max_prompt_tokens:
        raise ValueError(
            f"--rollout.max_prompt_tokens {max_prompt_tokens}: the longest context of {where} has {context_tokens} tokens, and the prompt template adds "
            f"{overhead}; raise it to {context_tokens + overhead}, or cut contexts with --data.max_context_tokens {max(1, max_prompt_tokens - overhead)}"
        )
