"""Merges the adapter of a checkpoint into its base, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rpt_lightning.compat.peft import part_names
from rpt_lightning.policy.adapter import merged
from rpt_lightning.pretrained.adapter_folder import base_of, check_base
from rpt_lightning.pretrained.weights_hash import weight_files, weights_hash
from rpt_lightning.training.checkpoint.adapter import saved_adapter
from rpt_lightning.training.checkpoint.reader import SavedPolicy


def model_path_of(about: Mapping[str, Any], where: str) -> str:
    """Return the folder or hub id that has configuration and tokenizer of a checkpoint's policy."""
    saved = saved_adapter(about, where)
    return base_of(str(about["policy_path"])) if saved is None else saved[1]


def with_base(saved: SavedPolicy, where: str) -> SavedPolicy:
    """Return a checkpoint with an adapter as one that holds all weights, W + s B A in fp32.

    These are the weights that engines got. Each tensor is read and merged when it is asked for.

    Raises:
        ValueError: The base cannot be read, or its weights are not those of training. ``where`` begins the
            message.
    """
    adapter = saved_adapter(saved.about, where)
    assert adapter is not None
    settings, base, base_hash = adapter
    try:
        there = weights_hash(base, where=where)
        places = {name: file for file in weight_files(base) for name in _names(file)}
    except OSError as error:
        raise ValueError(
            f"{where}: its adapter belongs to the weights of {base}, which cannot be read ({error}). Put "
            "them back, or run from the directory in which training ran"
        ) from error
    check_base(there, base_hash, where=where, base=base)
    shapes = {}
    for name, file in places.items():
        with safe_open(file, framework="pt", device="cpu") as tensors:
            shapes[name] = torch.Size(tensors.get_slice(name).get_shape())

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            with safe_open(places[name], framework="pt", device="cpu") as tensors:
                weight = tensors.get_tensor(name).float()
            a_name, b_name = part_names(name.removesuffix(".weight"))
            if a_name in saved.shapes:
                parts = saved.read([a_name, b_name])
                weight = merged(weight, parts[a_name], parts[b_name], settings.scale)
            found[name] = weight
        return found

    return replace(saved, shapes=shapes, read=read)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt", device="cpu") as tensors:
        return list(tensors.keys())
