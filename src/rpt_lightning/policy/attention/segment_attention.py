"""Attention of a packed tree on CPU, as the sequence of calls that `segments.plan_segments` planned.

The partial results for a query are combined by their log-sum-exp, as flash attention does with its blocks
(arXiv:2205.14135, section 3.1). The backward pass gives each call the output and the log-sum-exp of the whole
row, so the call's gradients are its share of the whole.

The two kernels are those that ``scaled_dot_product_attention`` itself runs on CPU (compat/torch.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rpt_lightning.compat.torch import cpu_flash_attention, cpu_flash_attention_backward
from rpt_lightning.policy.attention.segments import SegmentCall


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    calls: Sequence[SegmentCall],
    masks: Mapping[SegmentCall, Tensor],
    *,
    scale: float,
) -> Tensor:
    """Compute the attention output, ``[1, H, N, d]``.

    Args:
        query: ``[1, H, N, d]``.
        key: ``[1, H / groups, N, d]``. Grouped queries need no copies of the keys.
        value: Shaped like ``key``.
        calls: The calls from ``plan_segments``.
        masks: For each "masked" call, ``[1, 1, n, n]`` of 0 or -inf, in the dtype of ``query``.
        scale: Factor on the scores.
    """
    output: Tensor = _SegmentAttention.apply(query, key, value, calls, masks, scale)  # type: ignore[no-untyped-call]
    return output


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        calls: Sequence[SegmentCall],
        masks: Mapping[SegmentCall, Tensor],
        scale: float,
    ) -> Tensor:
        batch, heads, length, width = query.shape
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        # [1, H, N, d], in the memory layout that the next matrix product reads
        output = query.new_empty(batch, length, heads, width, dtype=wide).transpose(1, 2)
        logsumexp = query.new_empty(batch, heads, length, dtype=wide)
        for call in calls:
            queries, keys = _slices(call)
            part, part_logsumexp = cpu_flash_attention(
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                is_causal=call.kind == "causal",
                mask=masks.get(call),
                scale=scale,
            )
            if call.kind != "full":
                output[:, :, queries], logsumexp[:, :, queries] = part, part_logsumexp
                continue
            before = logsumexp[:, :, queries]
            both = torch.logaddexp(before, part_logsumexp)
            output[:, :, queries] = (
                output[:, :, queries]
                .mul_((before - both).exp_()[..., None])
                .addcmul_(part, (part_logsumexp - both).exp_()[..., None])
            )
            logsumexp[:, :, queries] = both
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.calls, ctx.masks, ctx.scale = calls, masks, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        grad_query, grad_key, grad_value = (
            torch.zeros_like(query),
            torch.zeros_like(key),
            torch.zeros_like(value),
        )
        for call in ctx.calls:
            queries, keys = _slices(call)
            parts = cpu_flash_attention_backward(
                grads[0][:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys],
                output[:, :, queries], logsumexp[:, :, queries].contiguous(),
                is_causal=call.kind == "causal", mask=ctx.masks.get(call), scale=ctx.scale,
            )  # fmt: skip
            grad_query[:, :, queries] += parts[0]
            grad_key[:, :, keys] += parts[1]
            grad_value[:, :, keys] += parts[2]
        return grad_query, grad_key, grad_value, None, None, None


def _slices(call: SegmentCall) -> tuple[slice, slice]:
    return slice(call.query_start, call.query_stop), slice(call.key_start, call.key_stop)
