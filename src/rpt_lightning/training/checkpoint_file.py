"""A checkpoint as it lies on disk, read without Lightning: one file, or the folder that a strategy with sharded weights writes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

_SHARDED_REST = "meta.pt"  # what Lightning writes beside the shards


def read_checkpoint(path: Path, *, flag: str) -> dict[str, Any]:
    """The content of a checkpoint file; its tensors stay on disk until they are used.

    ``flag`` is the option that named the file. Raises ValueError where there is no such file, it cannot be read, or it is not one of ours.
    """
    if (path / _SHARDED_REST).is_file():
        return _read_sharded(path)
    if not path.is_file():
        raise ValueError(f"{flag} {path}: no such file. `rpt fit` writes checkpoints into the run's folder, as checkpoints/step-N.ckpt.")
    try:
        # mmap: a checkpoint holds the optimizer too, three times the weights.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{flag} {path}: not a checkpoint that can be read ({type(error).__name__}). Was it cut off while it was written? "
            "Name another file of the run's checkpoints/."
        ) from error
    if not isinstance(checkpoint, dict) or "rpt" not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(
            f"{flag} {path}: not a checkpoint of `rpt fit` (it has no entry 'rpt' that says which policy it holds). "
            "A Hugging Face model is named by --model.policy.path instead."
        )
    return checkpoint


def _read_sharded(path: Path) -> dict[str, Any]:
    """The policy's weights put together from their shards in this process, without the optimizer's.

    The index of the shards is torch.distributed.checkpoint's own pickle; like the shards it must be yours.
    """
    reader = FileSystemReader(path)
    prefix = "state_dict."
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(f"{prefix}policy.") and isinstance(entry, TensorStorageMetadata)
    }
    load(weights, storage_reader=reader, no_dist=True)
    rest: dict[str, Any] = torch.load(path / _SHARDED_REST, map_location="cpu", weights_only=True)
    return rest | {"state_dict": {name.removeprefix(prefix): tensor for name, tensor in weights.items()}}
