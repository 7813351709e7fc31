"""Packed trees for `flex_attention`, the kernel on CUDA devices.

It computes only blocks that hold a permitted pair.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rpt_lightning.compat.torch import allow_recompilations

BLOCK = 128
MAX_COMPILATIONS = 128


def bucket_length(num_tokens: int) -> int:
    """Return the length to which a tree of ``num_tokens`` tokens is padded.

    Each new length would need a compilation. There are therefore only four lengths between a power of two and
    the next, and a tree grows by at most a quarter.

    >>> [bucket_length(n) for n in (1, 128, 129, 1025, 9000, 16384)]
    [128, 128, 256, 1280, 10240, 16384]
    """
    step = max(BLOCK, 2 ** max(0, (num_tokens - 1).bit_length() - 3))
    return -(-num_tokens // step) * step


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
    # Each bucket of lengths and each precision needs a compilation. Beyond the default limit of 8, torch
    # would silently compute every pair.
    allow_recompilations(MAX_COMPILATIONS)
    return torch.compile(flex_attention, dynamic=False)
