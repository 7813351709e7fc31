"""Read the weights that vLLM computes with, under their names in transformers' model.

compat/vllm/layers.py finds a tensor in vLLM's layers by its name in the family's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rpt_lightning.compat.vllm.layers import read_experts, read_tensor
from rpt_lightning.rollout.weight_sync.file_names import make_skeleton, names_in_files
from rpt_lightning.rollout.weight_sync.weight_part import split_part, take

# Kept with each model, because finding the names takes a moment.
_NAMES_IN_FILES: WeakKeyDictionary[nn.Module, dict[str, list[str]]] = WeakKeyDictionary()


@torch.no_grad()
def read_weights(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copy weights to the CPU, in the engine's dtype.

    Args:
        model: vLLM's model. If it is split over devices (tensor parallelism, not pipelines), every worker
            must call this.
        names: Hugging Face names, such as ``model.layers.0.self_attn.q_proj.weight``, or names of parts
            (rollout/weight_sync/weight_part.py).
        dtype: Data type of the engine.

    Raises:
        ValueError: A tensor cannot be found or read.
    """
    return {name: _read(model, name, dtype).to("cpu", dtype, copy=True).contiguous() for name in names}


def _read(model: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    name, columns = split_part(name)
    in_files = _names_in_files(model).get(name, [name])
    if len(in_files) > 1:  # one tensor in the policy, one for each expert in files, and one again in vLLM
        return take(read_experts(model, name, in_files[0]), columns)
    return read_tensor(model, in_files[0], dtype=dtype, columns=columns, shown_as=name)


def _names_in_files(model: nn.Module) -> dict[str, list[str]]:
    if not hasattr(model, "config"):
        return {}
    if model not in _NAMES_IN_FILES:
        _NAMES_IN_FILES[model] = names_in_files(make_skeleton(cast(Any, model).config))
    return _NAMES_IN_FILES[model]
