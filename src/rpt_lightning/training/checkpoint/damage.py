"""Checks that a checkpoint is whole and holds only data, before anything is loaded from it.

``torch.load`` verifies no checksum: it silently loads a weight with a flipped byte.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from rpt_lightning.compat.lightning_checkpoint import SHARDED_REST
from rpt_lightning.compat.torch import SHARD_INDEX, SHARD_INDEX_NAMES


def checkpoint_damage(path: Path) -> str | None:
    """Describe the damage of a checkpoint, or return None.

    In a single file every byte is verified by its checksum. In a folder of shards the sizes are compared with
    the index, and everything that is not a tensor is read.
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
    if not (path / SHARDED_REST).is_file():
        return f"it has no {SHARDED_REST}"
    if damage := _file_damage(path / SHARDED_REST):
        return damage
    index = _IndexUnpickler(io.BytesIO((path / SHARD_INDEX).read_bytes())).load()
    for entry in index.storage_data.values():
        shard, needed = path / entry.relative_path, entry.offset + entry.length
        size = shard.stat().st_size if shard.is_file() else 0
        if size < needed:
            return f"its shard {shard.name} has {size} bytes instead of at least {needed}"
        if entry.transform_descriptors:
            return (
                f"its shard {shard.name} is transformed ({', '.join(entry.transform_descriptors)}), "
                "which shards of ours are not"
            )
    _check_values(path, index)
    return None


def _check_values(path: Path, index: Any) -> None:
    """Raise UnpicklingError if an entry that is not a tensor (a learning rate, ...) could run code.

    torch reads these entries with ``weights_only=False``.
    """
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
    """Builds the records of an index and nothing else.

    Any other name that an index holds could run code, and so could importing its module.
    """

    def find_class(self, module: str, name: str) -> Any:
        import torch

        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in SHARD_INDEX_NAMES and not is_dtype:
            raise pickle.UnpicklingError(
                f"its index names {module}.{name}, which no index of ours does: it may run code when read"
            )
        return super().find_class(module, name)
