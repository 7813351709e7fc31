"""How a single-file checkpoint reaches the disk.

Lightning's own way builds the whole file in memory, writes it to the system's temporary folder and copies it
from there. A run that is killed meanwhile leaves the copy behind, and a 14B checkpoint would need the space
twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO


class StreamedCheckpointIO(CheckpointIO):
    """Writes a checkpoint straight to its place, and reads it without running code from it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(checkpoint, path)
        except RuntimeError as error:  # torch's writer raises it on a full disk
            raise OSError(f"{path}: {error}") from error

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def flush_to_disk(paths: Iterable[Path]) -> None:
    """Return once files and folders would survive a power cut.

    A full disk may surface only here (network file systems).
    """
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def files_of(checkpoint: Path) -> list[Path]:
    """The file itself, or the files of a sharded checkpoint and their folder."""
    return [*sorted(checkpoint.iterdir()), checkpoint] if checkpoint.is_dir() else [checkpoint]
