"""Model FLOPs by the usual rule: 2 a matrix weight and token forward, 4 more backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).

Attention's own products are left out (their share grows with the context), and so is what activation checkpointing computes again. The head is counted
at every token, scored or not. So these numbers compare runs of one model; `planning/flops.py` counts finer, for the speed of a machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def num_matrix_params(model: PreTrainedModel) -> int:
    """All parameters but an input embedding that is only looked up; one that is the output head too is a matrix. Of sharded weights the whole."""
    looked_up = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    num_params = sum(parameter.numel() for parameter in model.parameters())
    return num_params if looked_up is head else num_params - looked_up.numel()  # type: ignore[operator]


def forward_flops(num_params: int, tokens: float) -> float:
    """Of tokens that pass the model once."""
    return 2.0 * num_params * tokens


def train_flops(num_params: int, tokens: float) -> float:
    """Of tokens that pass it forward and backward."""
    return 6.0 * num_params * tokens
