"""Packed trees for `flex_attention`, the kernel of CUDA devices: only blocks that hold a permitted pair are computed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
MAX_COMPILATIONS = 128


def bucket_length(num_tokens: int) -> int:
    """The length that a tree is padded to: every length would be compiled anew, so there are four lengths to a doubling, at most a quarter too long.

    >>> [bucket_length(n) for n in (1, 128, 129, 1025, 9000, 16384)]
    [128, 128, 256, 1280, 10240, 16384]
    """
    step = max(BLOCK, 2 ** max(0, (num_tokens - 1).bit_length() - 3))
    return -(-num_tokens // step) * step


def tree_block_mask(subtree_end: Tensor, depth: Tensor, *, window: int | None = None) -> BlockMask:
    """The block mask of a tree in depth-first order (``key <= query < subtree_end[key]``), with a sliding window over depths if there is one.

    Blocks are judged by the bounds of their subtrees, so that the ``[N, N]`` mask never exists. A block is full if all of its pairs are permitted.

    Args:
        subtree_end: ``[N]``, N a multiple of ``BLOCK``.
        depth: ``[N]``.
        window: A query sees keys less than so many tokens back on its path.
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
    """Bool ``[Q, K]`` as counts ``[1, 1, Q]`` and, for each row, the indices of its blocks first, ``[1, 1, Q, K]``."""
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None].contiguous()


def flex(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, scale: float, enable_gqa: bool
) -> Tensor:
    """``flex_attention``, compiled on CUDA (uncompiled it computes every pair)."""
    kernel = _compiled() if query.is_cuda else flex_attention
    output: Any = kernel(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa)
    return output


@cache
def _compiled() -> Any:
    # One compilation for each bucket of lengths and each precision; beyond the default limit of 8, torch would silently compute every pair.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILATIONS)
    return torch.compile(flex_attention, dynamic=False)
