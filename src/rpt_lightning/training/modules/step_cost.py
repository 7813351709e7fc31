"""Counts what each step of a run costs, over all ranks and with its rollouts."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rpt_lightning.policy.flops import Work, forward_flops, model_size, train_flops
from rpt_lightning.training.distributed.ranks import Ranks

# Of one rank, since the start of its process: by the engine for training, through the policy without a
# gradient, and with one.
Works = tuple[Work, Work, Work]


class StepCost:
    """What each step costs, from the work that was done since the step before.

    `cost/tokens` is the sum of all tokens through the model, with shared prefixes counted once:

    - prompts that the engine computed (`rollout/prefill_tokens`);
    - sampled tokens (`rollout/tokens`);
    - tokens scored without a gradient (`cost/scored_tokens`): selection of tasks, log-prob check, old
      log-probs, dense rewards;
    - trained tokens (`cost/trained_tokens`).

    `cost/flops` counts the model's operations on them (policy/flops.py), and `cost/train_flops` those of
    training alone. `cost/time_s` is the time of the slowest rank, without validation and checkpoints.

    Args:
        model: The policy's model.
        works: The work so far, which belongs to no step.
    """

    def __init__(self, model: PreTrainedModel, works: Works) -> None:
        self._size = model_size(model)
        self._before = works

    def leave_out(self, works: Works) -> None:
        """Count the next step from here on, for example after a validation."""
        self._before = works

    def take(
        self, works: Works, *, generated_tokens: float, seconds: float, ranks: Ranks
    ) -> dict[str, float]:
        """Metrics of the work since the last call. A collective.

        Args:
            works: The work so far.
            generated_tokens: Tokens through the engine in this step, over all ranks.
            seconds: This rank's time for the step.
            ranks: The ranks of the run.
        """
        step = [work + -1 * earlier for work, earlier in zip(works, self._before, strict=True)]
        self._before = works
        counts = torch.tensor(
            [[work.tokens, work.scored_tokens, work.pairs] for work in step], dtype=torch.float64
        )
        generated, scored, trained = (
            Work(tokens=tokens, scored_tokens=scored_tokens, pairs=pairs)
            for tokens, scored_tokens, pairs in ranks.sum(counts).tolist()
        )
        trained_flops = train_flops(self._size, trained)
        return {
            "cost/scored_tokens": scored.tokens,
            "cost/trained_tokens": trained.tokens,
            "cost/tokens": generated_tokens + scored.tokens + trained.tokens,
            "cost/train_flops": trained_flops,
            "cost/flops": forward_flops(self._size, generated + scored) + trained_flops,
            "cost/time_s": float(ranks.max(seconds)),
        }
