"""One optimizer step of the policy: pack, add up gradients over micro-batches, clip, step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from rpt_lightning.policy.flops import add_works, tree_work
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.training.modules.micro_batches import MicroBatchLoss, accumulate_gradients, in_step
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.modules.warm_up import warm_up
from rpt_lightning.types import TrainSequence


def optimizer_step(
    module: PolicyModule, sequences: Sequence[TrainSequence], micro_batch_loss: MicroBatchLoss
) -> dict[str, Tensor]:
    """Do one optimizer step on a loss that is a sum over the packed trees of ``sequences``. A collective.

    Args:
        module: Holds the policy and its optimizer.
        sequences: This rank's sequences.
        micro_batch_loss: Computes a tree's share of the loss.

    Returns:
        Metrics. They include the computed tokens (without padding) and the gradient norm before clipping.
    """
    ranks, clock = module.ranks, module.clock
    optimizer: Any = module.optimizers()
    if module.device.type == "cuda" and not module.is_warm:
        warm_up(
            module.policy,
            max_tokens=module.micro_batch_tokens,
            device=module.device,
            backward=module.manual_backward,
        )
        module.is_warm = True
    optimizer.zero_grad()
    with clock.phase("pack"):
        trees = list(module.policy.pack(sequences, max_tokens=module.micro_batch_tokens))
    # A step with nothing to learn must give a zero gradient, not a missing one.
    micro_batches = in_step(trees, ranks, least=1)
    with clock.phase("forward_backward"):
        # Gradients are averaged over ranks, but the loss is a sum over them.
        loss = accumulate_gradients(
            module.policy,
            micro_batches,
            micro_batch_loss,
            max_tokens=module.micro_batch_tokens,
            device=module.device,
            backward=lambda loss: module.manual_backward(loss * ranks.num_data),
            without_reduction=_without_reduction(module.trainer.strategy),
        )
    work = add_works(map(tree_work, trees))
    module.trained_work += work
    loss = ranks.sum(loss)
    metrics = {
        "loss/total": loss,
        "train/packed_tokens": ranks.sum(work.tokens),
        "train/rank_imbalance": _imbalance(work.tokens, ranks),
        "train/plain_tokens": ranks.sum(sum(sequence.num_tokens for sequence in sequences)),
        "train/micro_batches": torch.tensor(float(len(micro_batches))),
    }
    with clock.phase("optimizer"):
        metrics["optim/grad_norm"] = _clip_and_step(module, optimizer, loss)
    metrics |= {
        "optim/lr": torch.tensor(float(optimizer.param_groups[0]["lr"])),
        "optim/skipped_steps": torch.tensor(float(module.skipped_steps.number)),
    }
    scheduler: Any = module.lr_schedulers()
    if scheduler is not None:
        scheduler.step()
    return metrics


def _without_reduction(strategy: Any) -> Callable[[], AbstractContextManager[Any]]:
    """Return a context in which backward passes add up gradients on each rank alone.

    DDP has one. Sharded gradients must be reduced in every pass, since no rank has room for all of them.
    """
    return strategy.block_backward_sync if isinstance(strategy, ParallelStrategy) else nullcontext


def _imbalance(num_tokens: float, ranks: Ranks) -> Tensor:
    """Return the tokens of the busiest rank over their mean, or 1 for a step without any. A collective."""
    total = ranks.sum(num_tokens)
    return ranks.max(num_tokens) * ranks.num_data / total if total > 0 else torch.ones(())


def _clip_and_step(module: PolicyModule, optimizer: Any, loss: Tensor) -> Tensor:
    """Step unless loss or gradients are not finite. Return the gradient norm before clipping."""
    norm = clip_gradients(module.policy.parameters(), module.gradient_clip)
    if module.skipped_steps.count(loss=loss, norm=norm):
        # A step without gradients leaves every weight and moment unchanged, but still counts as a step.
        optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def clip_gradients(parameters: Any, largest_norm: float) -> Tensor:
    """Scale gradients down to a global norm of at most ``largest_norm``, and return their norm before that.

    With sharded weights this is a collective. 0 clips nothing.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest_norm or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
