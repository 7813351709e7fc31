"""A hash of a model's weights, to recognise the base of an adapter."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open


def weight_files(path: str) -> list[Path]:
    """Return the safetensors files of a folder or hub id. The list is empty if it has none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors"]))
    return sorted(folder.glob("*.safetensors"))


def weights_hash(path: str, *, where: str) -> str:
    """Hash names, dtypes, shapes and values of all tensors, as 32 hex digits.

    How the tensors are spread over files does not matter. Reading is what takes the time: about a second
    for each GB or two.

    Raises:
        ValueError: The folder has no safetensors files. ``where`` begins the message.
    """
    files = weight_files(path)
    if not files:
        raise ValueError(
            f"{where}: {path} has no safetensors files, by whose hash an adapter recognises its base; save "
            "the model with save_pretrained(..., safe_serialization=True)"
        )
    names = [(file, name) for file in files for name in _names(file)]
    # hashlib releases the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = sorted(threads.map(lambda place: _digest(*place), names))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:32]


def of_first_rank(compute: Callable[[], str]) -> str:
    """Compute a text on the first rank and send it to the others. A collective.

    An error on the first rank is raised on every rank.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return compute()
    found: list[str | ValueError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            found = [compute()]
        except ValueError as error:
            found = [error]
    torch.distributed.broadcast_object_list(found)
    if isinstance(found[0], ValueError):
        raise found[0]
    return str(found[0])


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt", device="cpu") as tensors:
        return list(tensors.keys())


def _digest(file: Path, name: str) -> str:
    with safe_open(file, framework="pt", device="cpu") as tensors:
        tensor = tensors.get_tensor(name)
    content = tensor.contiguous().flatten().view(torch.uint8).numpy() if tensor.numel() else b""
    return f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"
