"""Packed trees for `flex_attention`, the kernel on CUDA devices.

It computes only blocks that hold a permitted pair.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rpt_lightning.compat.torch import allow_recompilations

BLOCK = 128
MAX_COMPILATIONS = 128


# Shares of a micro-batch's token budget to which trees are padded.
BUCKETS = (1 / 4, 1 / 2, 3 / 4, 7 / 8, 1)


def bucket_lengths(max_tokens: int) -> list[int]:
    """Return the lengths to which trees of at most ``max_tokens`` tokens are padded. The last is the longest.

    Each length needs a compilation of its own, so there are at most five. Most trees are nearly full. `pack`
    leaves only the last ones of a rank shorter.

    >>> bucket_lengths(12288), bucket_lengths(100)
    ([3072, 6144, 9216, 10752, 12288], [128])
    """
    return sorted({_blocks(share * max_tokens) for share in BUCKETS})


def bucket_length(num_tokens: int, max_tokens: int) -> int:
    """Return the length to which a tree of ``num_tokens`` tokens is padded.

    A single sequence may be longer than the budget ``max_tokens``. It is padded to a multiple of a quarter of
    the budget.

    >>> [bucket_length(n, 16384) for n in (1, 2049, 9000, 16384, 16385)]
    [4096, 4096, 12288, 16384, 20480]
    """
    fitting = [length for length in bucket_lengths(max_tokens) if length >= num_tokens]
    step = _blocks(max_tokens / 4)
    return fitting[0] if fitting else -(-num_tokens // step) * step


def _blocks(num_tokens: float) -> int:
    """Round up to whole blocks."""
    return math.ceil(num_tokens / BLOCK) * BLOCK


def tree_block_mask(subtree_end: Tensor, depth: Tensor, *, window: int | None = None) -> BlockMask:
    """Build the block mask of a tree in depth-first order (``key <= query < subtree_end[key]``).

    The bounds of the subtrees decide which blocks are computed, so the ``[N, N]`` mask never exists. A block
    is full if all of its pairs are permitted.

    Args:
        subtree_end: ``[N]``, where N is a multiple of ``BLOCK``.
        depth: ``[N]``.
        window: If given, a query sees only keys that are less than this many tokens back on its path.
    """
    num_blocks = subtree_end.numel() // BLOCK
    assert num_blocks * BLOCK == subtree_end.numel()
    ends = subtree_end.view(num_blocks, BLOCK)
    index = torch.arange(num_blocks, device=subtree_end.device)
    first_query = index[:, None] * BLOCK  # [Q, 1]
    is_before = index[None, :] < index[:, None]  # [Q, K]
    some = (is_before & (ends.amax(1)[None, :] > first_query)) | (index[None, :] == index[:, None])
    full = is_before & (ends.amin(1)[None, :] >= first_query + BLOCK)
    if window is not None:
        depths = depth.view(num_blocks, BLOCK)
        some &= depths.amin(1)[:, None] - depths.amax(1)[None, :] < window
        full &= depths.amax(1)[:, None] - depths.amin(1)[None, :] < window

    def permitted(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (key <= query) & (query < subtree_end[key])
        return allowed if window is None else allowed & (depth[query] - depth[key] < window)

    return BlockMask.from_kv_blocks(
        *_listed(some & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=permitted
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Convert bool ``[Q, K]`` to the number of blocks in each row, ``[1, 1, Q]``, and their indices.

    The indices have shape ``[1, 1, Q, K]``. In each row, those of the listed blocks come first.
    """
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None].contiguous()


def flex(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, scale: float, enable_gqa: bool
) -> Tensor:
    """Run ``flex_attention``, compiled on CUDA. The uncompiled version computes every pair."""
    kernel = _compiled() if query.is_cuda else flex_attention
    output: Any = kernel(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa)
    return output


@cache
def _compiled() -> Any:
    # Each bucket of lengths, precision and window needs a compilation. Beyond the default limit of 8, torch
    # would silently compute every pair.
    allow_recompilations(MAX_COMPILATIONS)
    return torch.compile(flex_attention, dynamic=False)
