"""Floating-point operations of a step: a multiply-add counts as two."""

from __future__ import annotations

from rpt_lightning.planning.model_shape import ModelShape


def train_flops(shape: ModelShape, *, tokens: int, scored_tokens: int, pairs: int) -> float:
    """Forward and backward: 6 a weight and token (the head's only at scored tokens), and 12 x attention width a layer and permitted pair of tokens.

    A pair is a token and one that it attends to, itself included. What activation checkpointing computes again is not in it.

    Args:
        shape: Of the policy.
        tokens: Tokens fed to the model.
        scored_tokens: Tokens whose log-prob is computed.
        pairs: Permitted pairs.
    """
    dense = 6 * (shape.body_params * tokens + shape.head_params * scored_tokens)
    return float(dense + 12 * shape.attention_width * shape.num_layers * pairs)


def forward_flops(shape: ModelShape, *, tokens: int, scored_tokens: int, pairs: int) -> float:
    """The forward pass alone: a third of forward and backward."""
    return train_flops(shape, tokens=tokens, scored_tokens=scored_tokens, pairs=pairs) / 3
