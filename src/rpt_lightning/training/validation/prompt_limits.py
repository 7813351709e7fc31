"""Checks that all prompts fit, and computes the engine's context length.

The check runs before the first step, not when the longest prompt is drawn.
"""

from __future__ import annotations

from typing import Any, Literal

from rpt_lightning.objectives.base import BoundObjective

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


def check_prompts(
    data: Any, split: Literal["train", "heldout"], objective: BoundObjective, *, max_prompt_tokens: int
) -> None:
    """Raise ValueError if a prompt of a split is too long. A user's own data module may not know."""
    context_limit = getattr(data, "context_limit", None)
    limit = None if context_limit is None else context_limit(split)
    if limit is None:
        return
    overhead = objective.num_overhead_tokens
    if limit.tokens + overhead > max_prompt_tokens:
        remedy = limit.remedy.format(room=max(1, max_prompt_tokens - overhead))
        raise ValueError(
            f"--rollout.max_prompt_tokens {max_prompt_tokens}: the longest context of {limit.where} has "
            f"{limit.tokens} tokens, and the prompt template adds {overhead}; raise it to "
            f"{limit.tokens + overhead}, or {remedy}"
        )
