"""A checkpoint file as it lies on disk, read without Lightning and without its tensors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: Path, *, flag: str) -> dict[str, Any]:
    """The content of a checkpoint file; its tensors stay on disk until they are used.

    ``flag`` is the option that named the file. Raises ValueError where there is no such file, it cannot be read, or it is not one of ours.
    """
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
