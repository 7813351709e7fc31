"""litdata: writing and reading one folder of shards, and fetching from S3. Tested with litdata 0.2.76.

litdata documents ``optimize``, which starts processes of its own, and ``StreamingDataset``. We use what they
are made of. The functions import litdata themselves, because its import takes long.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

INDEX_FILE = "index.json"  # litdata writes it beside the chunks of a folder


@dataclass(frozen=True, slots=True)
class Chunk:
    """One file of a folder, as the index describes it."""

    filename: str
    num_bytes: int
    num_items: int


def read_index(folder: Path) -> tuple[list[Chunk], list[str]]:
    """Return a folder's chunks, and the names of the serializers of an item's values.

    Relies on the content of ``index.json``: ``chunks`` with ``filename``, ``chunk_bytes`` and ``chunk_size``,
    and ``config`` with ``data_format``, in which options may follow a name after a colon.

    Raises OSError, ValueError, KeyError or TypeError if the file is not such an index.
    """
    index: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text())
    chunks = [
        Chunk(str(chunk["filename"]), chunk["chunk_bytes"], int(chunk["chunk_size"]))
        for chunk in index["chunks"]
    ]
    return chunks, [str(name).split(":")[0] for name in index["config"]["data_format"]]


def write_items(folder: Path, items: Iterable[dict[str, Any]], *, chunk_bytes: str) -> None:
    """Write items in order into an existing folder. Without any items it writes nothing.

    Relies on ``BinaryWriter`` and its ``add_item``, ``done`` and ``merge``.
    """
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=chunk_bytes)
    num_items = 0
    for num_items, item in enumerate(items, start=1):
        writer.add_item(num_items - 1, item)
    if num_items:  # the merge waits forever for the index of a writer that wrote nothing
        writer.done()
        writer.merge()


def open_items(folder: Path) -> Any:
    """Open a folder for reading items by their index, in any order.

    Relies on the parameter ``batch_decode`` of ``StreamingDataset``. By default litdata would decode 256
    neighbours of each item.
    """
    from litdata import StreamingDataset

    return StreamingDataset(str(folder), batch_decode=0)


def s3_fetcher(url: str, config: Any) -> Callable[[str, BinaryIO], None]:
    """Return a function that downloads the file at an address below ``url`` into a file object.

    Relies on ``get_downloader`` and on the ``download_fileobj`` of what it returns. Its ``download_file``
    silently skips a file that another process is fetching. ``config`` is botocore's ``Config``. Without one,
    litdata would try a thousand times before it reports that a storage is unreachable.
    """
    from litdata.streaming.downloader import get_downloader

    fetch: Callable[[str, BinaryIO], None] = get_downloader(
        url, "", [], storage_options={"config": config}
    ).download_fileobj
    return fetch
