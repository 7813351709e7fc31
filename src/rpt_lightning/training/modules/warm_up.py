"""Compiles the kernels of all lengths before the first step trains, on all ranks at the same time.

Otherwise each rank would compile a kernel when it first meets a length, and the others would wait each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rpt_lightning.policy.attention.block_mask import bucket_lengths
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing.trees import PackedTree
from rpt_lightning.types import TrainSequence


def warm_up(
    policy: Policy, *, max_tokens: int, device: torch.device, backward: Callable[[Tensor], Any]
) -> None:
    """Run a forward and backward pass, and a forward pass alone, at each length that trees are padded to.

    The loss is 0 and so is the gradient, which the caller drops. Under a sharded strategy this is a
    collective. Models that cannot take trees compile nothing for their lengths, and nothing runs.

    Args:
        policy: The policy, on ``device``.
        max_tokens: The token budget of a micro-batch.
        device: The device on which this rank computes.
        backward: Runs the backward pass of a loss.
    """
    if not policy.shares_prefixes:
        return
    start = time.perf_counter()
    lengths = bucket_lengths(max_tokens)
    for length in lengths:
        tree = forked_tree(policy, length, max_tokens=max_tokens).to(device)
        backward(policy(tree)[0].sum() * 0.0)
        with torch.no_grad():
            policy(tree)
    rank_zero_info(
        f"compiled for trees of {', '.join(f'{length:,}' for length in lengths)} tokens in "
        f"{time.perf_counter() - start:.0f} s"
    )


def forked_tree(policy: Policy, num_tokens: int, *, max_tokens: int) -> PackedTree:
    """Return a tree of ``num_tokens`` input tokens that ends with a fork.

    A tree without a fork is a plain text, for which another kernel runs.
    """
    prompt_ids = (0,) * (num_tokens - 2)
    sequences = [TrainSequence(prompt_ids=prompt_ids, target_ids=(token_id, 0)) for token_id in (0, 1)]
    (tree,) = policy.pack(sequences, max_tokens=num_tokens + 2)  # with the two leaves
    return replace(tree, max_tokens=max_tokens)
