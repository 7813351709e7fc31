"""One split on disk: litdata shards with one item per document, and each document's number of positions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.compat.litdata import INDEX_FILE, read_index, write_items
from rpt_lightning.data.store.item_format import Item, encode_item

NUM_POSITIONS_FILE = "num_positions.npy"
# The writer below only writes plain arrays. Folders of format 1 also have text. Anything else, pickle above
# all, can run code when it is read.
SAFE_FORMATS = ("str", "numpy", "no_header_numpy")


def write_split(folder: Path, items: Iterable[Item], *, chunk_bytes: str) -> NDArray[np.int32]:
    """Write ``items`` in order. Returns the number of positions of each item. -> [D].

    Without any items the split cannot be read.
    """
    folder.mkdir(parents=True)
    num_positions: list[int] = []

    def encoded() -> Iterator[dict[str, NDArray[Any]]]:
        for item in items:
            yield encode_item(item)
            num_positions.append(len(item["positions"]))

    write_items(folder, encoded(), chunk_bytes=chunk_bytes)
    counts = np.array(num_positions, dtype=np.int32)
    np.save(folder / NUM_POSITIONS_FILE, counts, allow_pickle=False)
    return counts


def check_split(folder: Path, *, has_chunks: bool = True) -> tuple[list[int], NDArray[np.int32]]:
    """Return the number of documents in each chunk [C] and of positions in each document [D].

    Without ``has_chunks`` the chunks are not checked. Raises ValueError if the folder is incomplete or
    damaged, or if it names a serializer that could run code.
    """
    way_out = "make the task folder again with `rpt prepare`"
    try:
        chunks, formats = read_index(folder)
        num_positions: NDArray[np.int32] = np.load(folder / NUM_POSITIONS_FILE, allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a readable split of a task folder ({error}); {way_out}") from error
    unsafe = [name for name in formats if name not in SAFE_FORMATS]
    if unsafe:
        raise ValueError(
            f"{folder / INDEX_FILE} names the serializer {unsafe[0]!r}; "
            f"only {', '.join(SAFE_FORMATS)} are read, since others can run code; {way_out}"
        )
    for chunk in chunks if has_chunks else ():
        path = folder / chunk.filename
        size = path.stat().st_size if path.is_file() else None
        if size != chunk.num_bytes:
            found = "is missing" if size is None else f"has {size} bytes instead of {chunk.num_bytes}"
            raise ValueError(f"{path} {found}: the task folder is incomplete; {way_out}")
    sizes = [chunk.num_items for chunk in chunks]
    if sum(sizes) != len(num_positions):
        raise ValueError(
            f"{folder}: {sum(sizes)} documents in the shards "
            f"but {len(num_positions)} in {NUM_POSITIONS_FILE}; {way_out}"
        )
    return sizes, num_positions


def folder_checksums(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of the files of a split, or of the tokenizer, by name.

    litdata's index is left out: it is never the same twice, and `check_split` examines it.
    """
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != INDEX_FILE}


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_file(path: Path, sha256: str) -> None:
    """Raise ValueError if a file differs from the one that was written."""
    if file_sha256(path) != sha256:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is not the one that `rpt prepare` wrote into the manifest; "
            "copy the file again from where it came from, or make the task folder again with `rpt prepare`"
        )


def replace_file(path: Path, write: Any) -> None:
    """Write a file atomically: call ``write`` with a temporary path and move the result to ``path``."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
