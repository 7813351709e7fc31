"""A budget of tokens for each completion, which falls over a run (RMT, arXiv:2509.24375).

With ``t`` for the optimizer steps before the one that trains a completion, ``T`` for ``steps`` and ``l`` for
the number of its tokens,

    B_t      = max(B_min, floor(B_0 gamma^(t / T)))
    r_len(l) = l / B_t for l <= B_t,  2 - l / B_t for B_t < l <= 2 B_t,  else 0
    reward   = (1 - w) r + w r_len

with ``r`` for what the objective pays. The prompt states B_t.

RMT's budget is of the thought. Ours is of the whole completion, thought and answer, because objectives
without a marked thought have no other length. Three more choices are ours (docs/decisions.md): from step T on
the budget stays at B_T, held-out text is always asked with one fixed budget, and a completion without a
prediction earns no r_len.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rpt_lightning.flag_bounds import check_number

SLOT = "{budget}"
FLAG = "rollout.thought_budget"
WORDING = f"Think and answer in at most {SLOT} tokens."


def length_reward(length: int, budget: int) -> float:
    """Return r_len of a completion of ``length`` tokens, from 0 to 1.

    >>> [length_reward(length, 40) for length in (0, 20, 40, 60, 80, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    return length / budget if length <= budget else max(0.0, 2.0 - length / budget)


@dataclass(frozen=True, kw_only=True)
class ThoughtBudget:
    """A token budget that falls over the run, and a reward for lengths close to it (RMT).

    Args:
        initial: Budget at the first step, in tokens of thought and answer together (B_0). It is 800 in RMT
            (arXiv:2509.24375). None sets no budget.
        steps: Number of optimizer steps over which the budget falls (T), usually all steps of the run. The
            budget is constant afterwards.
        decay: Fraction of the initial budget that is left after these steps (gamma).
        least: The budget never falls below this number of tokens (B_min).
        weight: Weight w of the length reward, from 0 to 1. The objective's reward has the weight 1 - w.
        heldout: Budget for held-out text, in tokens. None means the budget at the end of the schedule.
        wording: How the prompt states the budget, with {budget} for the number. With None, prompts do not
            mention the budget, and only the reward depends on it.
    """

    initial: int | None = None
    steps: int | None = None
    decay: float = 0.2
    least: int = 1
    weight: float = 0.1
    heldout: int | None = None
    wording: str | None = WORDING

    def __post_init__(self) -> None:
        check_number(f"{FLAG}.initial", self.initial, least=1, hint=" tokens, or null for no budget")
        check_number(f"{FLAG}.steps", self.steps, least=1)
        check_number(f"{FLAG}.decay", self.decay, above=0, most=1, hint="; 1 keeps the budget as it is")
        check_number(f"{FLAG}.least", self.least, least=1)
        check_number(f"{FLAG}.weight", self.weight, least=0, below=1, hint="; 0 leaves the length term out")
        check_number(f"{FLAG}.heldout", self.heldout, least=1)
        if self.wording is not None and self.wording.count(SLOT) != 1:
            raise ValueError(
                f"{FLAG}.wording={self.wording!r}: write {SLOT} once, where the number belongs, "
                "or give null for prompts that do not state the budget"
            )
        if self.initial is None:
            return
        if self.steps is None:
            raise ValueError(
                f"{FLAG}.initial={self.initial}: a budget falls over {FLAG}.steps, which is not set; give "
                "the run's number of optimizer steps, as in trainer.max_steps"
            )
        if self.initial < self.least:
            raise ValueError(
                f"{FLAG}.initial={self.initial}, {FLAG}.least={self.least}: the budget begins below its "
                "smallest value; raise the first or lower the second"
            )

    @property
    def is_set(self) -> bool:
        """Whether there is a budget."""
        return self.initial is not None

    @property
    def is_stated(self) -> bool:
        """Whether prompts depend on it."""
        return self.is_set and self.wording is not None

    def at(self, step: int) -> int:
        """Return the budget (tokens) of completions that are trained after ``step`` optimizer steps.

        >>> budget = ThoughtBudget(initial=800, steps=100)
        >>> [budget.at(step) for step in (0, 25, 50, 75, 100, 1000)]
        [800, 534, 357, 239, 160, 160]
        """
        assert self.initial is not None
        assert self.steps is not None
        left = self.initial * self.decay ** (min(step, self.steps) / self.steps)
        # A power may end just below the whole number that it should be: 1000 * 0.1 ** (2 / 2).
        return max(self.least, math.floor(left + 1e-9))

    @property
    def of_heldout(self) -> int:
        """The budget on held-out text, in tokens, whatever the step."""
        assert self.steps is not None
        return self.at(self.steps) if self.heldout is None else self.heldout

    @property
    def values(self) -> list[int]:
        """All budgets that prompts may state, ascending."""
        assert self.steps is not None
        return sorted({self.of_heldout, *map(self.at, range(self.steps + 1))})

    def note(self, budget: int) -> str:
        """Return how a prompt states a budget."""
        assert self.wording is not None
        return self.wording.replace(SLOT, str(budget))

    def mixed(
        self, rewards: Sequence[float], lengths: Sequence[int | None], budget: int
    ) -> tuple[float, ...]:
        """Add the length term to an objective's rewards. ``lengths`` are None where it is not earned.

        >>> ThoughtBudget(initial=40, steps=1, weight=0.25).mixed([1.0, 1.0, 0.0], [40, 60, None], 40)
        (1.0, 0.875, 0.0)
        """
        return tuple(
            (1 - self.weight) * reward
            + self.weight * (0.0 if length is None else length_reward(length, budget))
            for reward, length in zip(rewards, lengths, strict=True)
        )


NO_BUDGET = ThoughtBudget()
