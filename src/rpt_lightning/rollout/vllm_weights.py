"""The weights that vLLM computes with, under their Hugging Face names.

vLLM fuses projections (q, k, v into one matrix, gate and up into another), and on CPU it packs most matrices into a kernel's
own layout and throws the plain tensor away. So on CPU a matrix is read by sending the identity through the layer's own kernel:
each product adds up one weight and zeros, without rounding (only the sign of a zero is lost). That is slower than a copy and
better than one: it sees what is really multiplied, such as a packed head that still belongs to the weights before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rpt_lightning.rollout.weight_part import split_part, take


@torch.no_grad()
def read_weights(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies on the CPU, in the engine's dtype.

    Args:
        model: vLLM's model. Where it is split over devices (tensor parallelism, not pipelines), every worker must call this.
        names: Hugging Face names, such as ``model.layers.0.self_attn.q_proj.weight``, or names of parts (rollout/weight_part.py).
        dtype: Of the engine.

    Raises ValueError for a tensor that cannot be found or read.
    """
    return {name: _read(model, name, dtype).to("cpu", dtype, copy=True).contiguous() for name in names}


def _read(model: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    name, columns = split_part(name)
    path, _, kind = name.rpartition(".")
    parent, _, leaf = path.rpartition(".")
    modules = dict(model.named_modules())
    if path in modules:
        layer: Any = modules[path]
        if hasattr(layer, "embedding_dim"):  # embedding or head: devices share its rows, so that each has a part of every column
            return _whole(layer, _own_part(layer, kind, name, dtype, columns), kind)
        return take(_whole(layer, _own_part(layer, kind, name, dtype), kind), columns)
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        layer = modules.get(f"{parent}.{fused}" if parent else fused)
        if layer is not None and leaf in parts:
            pieces = _own_part(layer, kind, name, dtype).split_with_sizes(list(layer.output_partition_sizes))
            index = parts.index(leaf)
            # Where there are more devices than key-value heads, several hold the same one.
            num_replicas = getattr(layer, "num_kv_head_replicas", 1) if index > 0 else 1
            return take(_whole(layer, pieces[index], kind, num_replicas=num_replicas), columns)
    raise ValueError(f"vLLM's {type(model).__name__} has no layer that holds {name}")


def _own_part(layer: Any, kind: str, name: str, dtype: torch.dtype, columns: slice | None = None) -> Tensor:
    """What this device holds of the layer's weight or bias, or of some columns of it."""
    tensor: Tensor | None = getattr(layer, kind, None)
    if tensor is None:
        raise ValueError(f"vLLM's layer for {name} ({type(layer).__name__}) has no {kind}")
    is_lookup = hasattr(layer, "org_vocab_size") and not type(layer).__name__.startswith("ParallelLMHead")
    if kind == "weight" and hasattr(layer, "cpu_linear") and not is_lookup:
        return _through_kernel(layer, dtype, columns)
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise ValueError(f"vLLM's layer for {name} ({type(layer).__name__}) keeps no readable {kind}")
    return take(tensor, columns)


def _whole(layer: Any, part: Tensor, kind: str, *, num_replicas: int = 1) -> Tensor:
    """The parts of all devices of a tensor-parallel server together (a collective of its workers), without the padding of vocabularies."""
    num_devices = getattr(layer, "tp_size", 1)
    splits_inputs = getattr(layer, "input_size_per_partition", None) != getattr(layer, "input_size", None)
    is_replicated = type(layer).__name__ == "ReplicatedLinear" or (splits_inputs and kind == "bias")
    if num_devices > 1 and not is_replicated:
        from vllm.distributed import get_tp_group

        part = get_tp_group().all_gather(part.contiguous(), dim=1 if splits_inputs else 0)
        if num_replicas > 1:
            part = torch.cat(part.chunk(num_devices)[::num_replicas])
    return part[: layer.org_vocab_size] if hasattr(layer, "org_vocab_size") else part


def _through_kernel(layer: Any, dtype: torch.dtype, columns: slice | None) -> Tensor:
    """The layer's matrix [out, in], or some columns of it, as its CPU kernel multiplies it."""
    num_inputs = layer.embedding_dim if hasattr(layer, "embedding_dim") else layer.input_size_per_partition
    inputs = torch.eye(num_inputs, dtype=dtype)
    outputs: Tensor = layer.cpu_linear(inputs if columns is None else inputs[columns], layer.weight, None)  # [in, out]
    return outputs.t()
