"""Reads a checkpoint from disk without Lightning: a single file, or the folder of a sharded strategy."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from rpt_lightning.compat.lightning_checkpoint import SHARDED_REST, SHARDED_WEIGHTS
from rpt_lightning.compat.torch import stored_tensors
from rpt_lightning.training.checkpoint.damage import checkpoint_damage

_WEIGHTS_PREFIX = "policy.model."
# Entries that describe the policy (PolicyModule.on_save_checkpoint).
_OF_THE_POLICY: dict[str, type] = {"policy_path": str, "policy_config": str, "tokenizer_hash": str}
_OF_THE_RUN: dict[str, type] = {
    "weight_shapes": dict,
    "global_step": int,
    "num_skipped_steps": int,
    "skipped_in_a_row": int,
}


@dataclass(frozen=True, kw_only=True)
class SavedPolicy:
    """A checkpoint's description of its policy, and its weights. They stay on disk until they are read."""

    about: dict[str, Any]  # the checkpoint's entry "rpt"
    shapes: Mapping[str, torch.Size]  # by Hugging Face names
    read: Callable[[Sequence[str]], dict[str, Tensor]]  # returns the weights of these names, whole


def read_checkpoint(path: Path, *, flag: str) -> SavedPolicy:
    """Read the policy of a checkpoint.

    Args:
        path: File, or folder of shards.
        flag: The option that named it, for error texts.

    Raises:
        ValueError: There is no such file, it cannot be read, or `rpt fit` did not write it.
    """
    if (path / SHARDED_REST).is_file():
        return _read_sharded(path, flag=flag)
    if not path.is_file():
        raise ValueError(
            f"{flag} {path}: no such file. "
            "`rpt fit` writes checkpoints into the run's folder, as checkpoints/step-N.ckpt."
        )
    try:
        # mmap: a checkpoint holds the optimizer too, three times the weights.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{flag} {path}: not a checkpoint that can be read ({type(error).__name__}). Was it cut off "
            "while it was written? Name another file of the run's checkpoints/."
        ) from error
    if not isinstance(checkpoint, dict) or "rpt" not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(
            f"{flag} {path}: not a checkpoint of `rpt fit` (it has no entry 'rpt' that says which policy it "
            "holds). A Hugging Face model is named by --model.policy.path instead."
        )
    if not isinstance(checkpoint["state_dict"], dict) or not all(
        isinstance(tensor, Tensor) for tensor in checkpoint["state_dict"].values()
    ):
        raise ValueError(
            f"{flag} {path}: its entry 'state_dict' does not consist of weights, so the file is damaged; "
            "name another of the run's checkpoints/"
        )
    # torch.load maps the file, so these tensors are read from disk when they are used.
    weights = {
        name.removeprefix(_WEIGHTS_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(_WEIGHTS_PREFIX)
    }
    return SavedPolicy(
        about=checkpoint["rpt"],
        shapes={name: tensor.shape for name, tensor in weights.items()},
        read=lambda names: {name: weights[name] for name in names},
    )


def check_about(about: Any, where: str, *, resumes: bool = False) -> None:
    """Raise ValueError that names the entry if a checkpoint's description of its policy is incomplete.

    Args:
        about: The checkpoint's entry "rpt".
        where: Names the checkpoint in error texts.
        resumes: Whether the checkpoint resumes its run, which needs more entries.
    """
    if not isinstance(about, dict):
        raise ValueError(
            f"{where}: not a checkpoint of `rpt fit` (its entry 'rpt' is {type(about).__name__}); "
            "name another of a run's checkpoints/"
        )
    for name, kind in (_OF_THE_POLICY | (_OF_THE_RUN if resumes else {})).items():
        value = about.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = f"is a {type(value).__name__}" if name in about else "is missing"
            raise ValueError(
                f"{where}: its entry 'rpt.{name}' {found}, so the file was edited or is damaged; "
                "name another of the run's checkpoints/"
            )
    try:
        config = json.loads(about["policy_config"])
    except ValueError as error:
        raise ValueError(
            f"{where}: its entry 'rpt.policy_config' is not JSON ({error}); "
            "name another of the run's checkpoints/"
        ) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(
            f"{where}: its entry 'rpt.policy_config' names no model_type; "
            "name another of the run's checkpoints/"
        )


def _read_sharded(path: Path, *, flag: str) -> SavedPolicy:
    """Like ``read_checkpoint``, for shards. The requested weights are assembled in this process."""
    # This comes first: torch.distributed.checkpoint would unpickle whatever the index names.
    if damage := checkpoint_damage(path):
        raise ValueError(f"{flag} {path} is not a whole checkpoint: {damage}")
    prefix = f"{SHARDED_WEIGHTS}{_WEIGHTS_PREFIX}"
    entries = {
        name.removeprefix(prefix): entry
        for name, entry in stored_tensors(FileSystemReader(path)).items()
        if name.startswith(prefix)
    }

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        weights = {
            prefix + name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
            for name in names
        }
        load(weights, storage_reader=FileSystemReader(path), no_dist=True)
        return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}

    rest = torch.load(path / SHARDED_REST, map_location="cpu", weights_only=True)
    about: Any = rest.get("rpt") if isinstance(rest, dict) else None  # check_about validates it
    return SavedPolicy(about=about, shapes={name: entry.size for name, entry in entries.items()}, read=read)
