"""Attention of a packed tree on CPU, call by call as `segments.plan_segments` cut it.

The parts of one query are put together by their log-sum-exp, as flash attention does with its blocks (arXiv:2205.14135, section 3.1); the backward pass
gives each call the output and log-sum-exp of the whole row, which makes its gradients that call's share of the whole. The kernels are the two that
``scaled_dot_product_attention`` itself runs on CPU; called directly, because the public function does not return the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rpt_lightning.policy.segments import SegmentCall

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    calls: Sequence[SegmentCall],
    masks: Mapping[SegmentCall, Tensor],
    *,
    scale: float,
) -> Tensor:
    """Attention output ``[1, H, N, d]``.

    Args:
        query: ``[1, H, N, d]``.
        key: ``[1, H / groups, N, d]``: grouped queries need no copies of keys.
        value: Like ``key``.
        calls: From ``plan_segments``.
        masks: For each "masked" call ``[1, 1, n, n]``, 0 or -inf, in the dtype of ``query``.
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
        output = query.new_empty(batch, length, heads, width, dtype=wide).transpose(
            1, 2
        )  # [1, H, N, d], laid out as the next matrix product reads it
        logsumexp = query.new_empty(batch, heads, length, dtype=wide)
        for call in calls:
            queries, keys = _slices(call)
            part, part_logsumexp = _forward(
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                0.0,
                call.kind == "causal",
                attn_mask=masks.get(call),
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
            parts = _backward(
                grads[0][:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys], output[:, :, queries],
                logsumexp[:, :, queries].contiguous(), 0.0, call.kind == "causal", attn_mask=ctx.masks.get(call), scale=ctx.scale,
            )  # fmt: skip
            grad_query[:, :, queries] += parts[0]
            grad_key[:, :, keys] += parts[1]
            grad_value[:, :, keys] += parts[2]
        return grad_query, grad_key, grad_value, None, None, None


def _slices(call: SegmentCall) -> tuple[slice, slice]:
    return slice(call.query_start, call.query_stop), slice(call.key_start, call.key_stop)
