"""The attention function of a policy's layers: each token of a packed tree attends to its ancestors.

On each kind of device it uses the kernel that is fastest there. It is registered with transformers under
`NAME`. Any model whose layers look up their attention in the registry can therefore take trees without code
of its own. The tree passes through the model as the keyword ``tree``. Without a tree, the attention is plain
causal attention.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rpt_lightning.compat.transformers import SCORE_CHANGES
from rpt_lightning.policy.attention.segment_attention import segment_attention
from rpt_lightning.policy.attention.segments import SegmentCall, plan_segments

NAME = "rpt_tree"


class TreeMask:
    """Which token attends to which in a packed tree, in the form that each kernel needs.

    Each form is made once and used by every layer.

    Args:
        subtree_end: ``[N]``. The subtree of token ``i`` is ``[i, subtree_end[i])`` in depth-first order.
        depth: ``[N]``. The number of ancestors of each token.
    """

    def __init__(self, subtree_end: Tensor, depth: Tensor) -> None:
        self.subtree_end = subtree_end
        self.depth = depth
        self._additive: dict[torch.dtype, dict[SegmentCall, Tensor]] = {}
        self._windowed: dict[tuple[int, torch.dtype], Tensor] = {}
        self._block_masks: dict[int | None, Any] = {}

    @cached_property
    def is_chain(self) -> bool:
        """Whether the tree has no branches, so that attention is plain causal attention."""
        return bool((self.subtree_end == self.subtree_end.numel()).all())

    @cached_property
    def max_depth(self) -> int:
        return int(self.depth.max())

    def permitted(
        self, queries: slice = slice(None), keys: slice = slice(None), *, window: int | None = None
    ) -> Tensor:
        """Return bool ``[queries, keys]``, True where the query may attend to the key.

        Key ``j`` must be query ``i`` itself or an ancestor (``j <= i < subtree_end[j]``), and less than
        ``window`` tokens back.
        """
        index = torch.arange(self.subtree_end.numel(), device=self.subtree_end.device)
        query, key = index[queries, None], index[None, keys]
        allowed = (key <= query) & (query < self.subtree_end[None, keys])
        if window is None:
            return allowed
        depth = self.depth.int()  # there are as many differences as pairs, so int32 halves their memory
        return allowed & (depth[queries, None] - depth[None, keys] < window)

    @cached_property
    def calls(self) -> tuple[SegmentCall, ...]:
        return plan_segments(self.subtree_end.tolist())

    def additive(self, dtype: torch.dtype) -> dict[SegmentCall, Tensor]:
        """Return a mask of 0 or -inf for each masked call, ``[1, 1, n, n]``."""
        if dtype not in self._additive:
            self._additive[dtype] = {
                call: self._additive_of(call, dtype) for call in self.calls if call.kind == "masked"
            }
        return self._additive[dtype]

    def _additive_of(self, call: SegmentCall, dtype: torch.dtype) -> Tensor:
        part = slice(call.query_start, call.query_stop)
        return _zero_or_inf(self.permitted(part, part), dtype)[None, None]

    def windowed(self, window: int, dtype: torch.dtype) -> Tensor:
        """Return 0 or -inf for every pair, ``[N, N]``.

        From a bool mask, sdpa would build this in every layer.
        """
        if (window, dtype) not in self._windowed:
            self._windowed[window, dtype] = _zero_or_inf(self.permitted(window=window), dtype)
        return self._windowed[window, dtype]

    def block_mask(self, window: int | None) -> Any:
        if window not in self._block_masks:
            from rpt_lightning.policy.attention.block_mask import tree_block_mask

            self._block_masks[window] = tree_block_mask(self.subtree_end, self.depth, window=window)
        return self._block_masks[window]


def _zero_or_inf(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


# The loops over calls do not form a graph, and flex_attention is compiled separately.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: TreeMask | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer, through the interface of transformers.

    The query is ``[1, H, N, d]``. Key and value have the same number of heads or fewer. The output is ``[1,
    N, H, d]``.

    Raises:
        ValueError: The kernels do not compute this variant (capped scores, attention sinks, or values whose
            width differs from that of the queries).
    """
    if any(kwargs.get(name) is not None for name in SCORE_CHANGES):
        raise ValueError(
            f"{type(module).__name__} caps its attention scores or has attention sinks, which the attention "
            "of packed trees does not support"
        )
    if value.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{type(module).__name__} has heads of {query.shape[-1]} numbers for queries and "
            f"{value.shape[-1]} for values, which the attention of packed trees does not support"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Rotary embeddings leave query and key in fp32. Autocast knows that sdpa casts all three tensors, but
        # it does not know the other kernels.
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.shape[1] != key.shape[1]
    # A window as long as the longest path changes nothing.
    window = (
        sliding_window
        if tree is not None and sliding_window is not None and sliding_window <= tree.max_depth
        else None
    )
    if tree is None or (tree.is_chain and window is None):
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
    elif query.is_cuda:
        from rpt_lightning.policy.attention.block_mask import flex

        output = flex(query, key, value, block_mask=tree.block_mask(window), scale=scale, enable_gqa=grouped)
    elif window is not None:
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=tree.windowed(window, query.dtype), scale=scale, enable_gqa=grouped
        )
    else:
        output = segment_attention(query, key, value, tree.calls, tree.additive(query.dtype), scale=scale)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, tree_attention)
