"""Log-probs of a packed tree's target tokens from a transformers causal language model."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rpt_lightning.policy.attention.block_mask import bucket_length
from rpt_lightning.policy.logprobs import chosen_logprobs, most_likely, token_chunk
from rpt_lightning.policy.packing.trees import PackedTree

HeadDtype = Literal["compute", "float32"]


def score(
    model: PreTrainedModel,
    tree: PackedTree,
    *,
    temperature: float = 1.0,
    predict: bool = False,
    head_dtype: HeadDtype = "compute",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Score the M target tokens of a packed tree. `Policy` explains ``head_dtype`` and ``chunk_size``.

    ``temperature`` is that of the sequences without one of their own.

    Returns:
        ``(logprobs [M], entropy [M])`` of the tempered distribution. With ``predict``, the result is
        ``(logprobs [M], most likely ids [M])``.
    """
    hidden = _hidden(model, tree)[tree.parents]  # [M, D]
    dtype = torch.float32 if head_dtype == "float32" else _compute_dtype(hidden)
    weight, bias = _local(head_weight(model)), _local(head_bias(model))
    hidden = hidden.to(dtype)  # the weight is cast tile by tile
    chunk_size = chunk_size or token_chunk(on_gpu=hidden.is_cuda)
    # Autocast would cast the fp32 product back to bf16.
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropy = chosen_logprobs(
            hidden,
            weight,
            tree.targets,
            bias=bias,
            temperature=tree.temperatures(temperature),
            chunk_size=chunk_size,
        )
        return (
            (logprobs, most_likely(hidden, weight, bias=bias, chunk_size=chunk_size))
            if predict
            else (logprobs, entropy)
        )


def head_weight(model: PreTrainedModel) -> Tensor:
    """The output embedding, ``[V, D]``."""
    return cast(Tensor, model.get_output_embeddings().weight)  # type: ignore[no-untyped-call]


def head_bias(model: PreTrainedModel) -> Tensor | None:
    """The bias that the output head adds to its logits, ``[V]`` (Phi, GPT-J). Most models have none."""
    bias: Tensor | None = getattr(model.get_output_embeddings(), "bias", None)  # type: ignore[no-untyped-call]
    return bias


def _local(tensor: Tensor | None) -> Any:
    """Return the local tensor. The head is whole on every tensor-parallel rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _hidden(model: PreTrainedModel, tree: PackedTree) -> Tensor:
    """Return the final hidden states of the input tokens and of the tree's padding, ``[N, D]``."""
    rows: dict[str, Any] = {}
    if tree.row_length is None:
        if tree.token_ids.is_cuda:
            tree = tree.padded(bucket_length(tree.num_tokens, tree.max_tokens or tree.num_tokens))
        rows["tree"] = tree.tree_mask()
    width = tree.row_length or tree.num_tokens
    outputs: Any = model.base_model(
        input_ids=tree.token_ids.view(-1, width),
        position_ids=tree.position_ids.view(-1, width),
        use_cache=False,
        **rows,
    )
    hidden: Tensor = outputs.last_hidden_state.flatten(0, 1)
    return hidden


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
