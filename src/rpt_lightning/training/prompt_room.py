"""Whether every prompt of a task folder fits, said before the first step rather than when the longest task is drawn."""

from __future__ import annotations

from rpt_lightning.data.task_folder import TaskFolder
from rpt_lightning.tasks.prompt import BoundPrompt


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
