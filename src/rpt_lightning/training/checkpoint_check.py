"""Is a checkpoint whole, and is it only data? Looked at before anything is loaded from it.

``torch.load`` checks no checksum: a flipped byte of a weight is loaded without a word.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

_INDEX = ".metadata"  # what torch.distributed.checkpoint writes last into a folder of shards: a pickle
_REST = "meta.pt"  # what Lightning writes beside the shards
# Whatever else an index could name might run code, and so might what their modules import: each name is given in full.
_METADATA = "torch.distributed.checkpoint.metadata"
_INDEX_NAMES = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "set"),
    ("builtins", "list"),
    ("builtins", "dict"),
    ("builtins", "complex"),
}


def checkpoint_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Of one file every byte is compared with its checksum; of shards their sizes are compared with the index, and
    what is no tensor is read.
    """
    try:
        return _shard_damage(path) if path.is_dir() else _file_damage(path)
    except (
        OSError,
        EOFError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        AttributeError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"


def _file_damage(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    return None if bad is None else f"its part {bad} does not have its checksum"


def _shard_damage(path: Path) -> str | None:
    if not (path / _REST).is_file():
        return f"it has no {_REST}"
    if damage := _file_damage(path / _REST):
        return damage
    index = _IndexUnpickler(io.BytesIO((path / _INDEX).read_bytes())).load()
    for entry in index.storage_data.values():
        shard, needed = path / entry.relative_path, entry.offset + entry.length
        size = shard.stat().st_size if shard.is_file() else 0
        if size < needed:
            return f"its shard {shard.name} has {size} bytes instead of at least {needed}"
        if entry.transform_descriptors:
            return f"its shard {shard.name} is transformed ({', '.join(entry.transform_descriptors)}), which shards of ours are not"
    _check_values(path, index)
    return None


def _check_values(path: Path, index: Any) -> None:
    """What is no tensor (a learning rate, ...) torch reads with ``weights_only=False``: raises UnpicklingError where that would do more than make a value."""
    import torch
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    for name, kind in index.state_dict_metadata.items():
        if isinstance(kind, BytesStorageMetadata):
            entry = index.storage_data[MetadataIndex(name)]
            with (path / entry.relative_path).open("rb") as shard:
                shard.seek(entry.offset)
                content = shard.read(entry.length)
            torch.load(io.BytesIO(content), weights_only=True)


class _IndexUnpickler(pickle.Unpickler):
    """Builds the records of an index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _INDEX_NAMES and not is_dtype:
            raise pickle.UnpicklingError(
                f"its index names {module}.{name}, which no index of ours does: it may run code when it is read"
            )
        return super().find_class(module, name)
