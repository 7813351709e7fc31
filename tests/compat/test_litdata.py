from __future__ import annotations

from pathlib import Path

import numpy as np
from litdata import StreamingDataset
from litdata.streaming.downloader import S3Downloader, get_downloader
from litdata.streaming.serializers import _SERIALIZERS
from reliance import check_has, check_takes

from rpt_lightning.compat import litdata as compat
from rpt_lightning.data.store.shards import SAFE_FORMATS


def test_items_are_written_indexed_and_read_in_any_order(tmp_path: Path) -> None:
    items = [
        {"ids": np.arange(n, dtype=np.int32), "table": np.full((n, 2), n, dtype=np.float32)}
        for n in (3, 1, 4)
    ]
    compat.write_items(tmp_path, iter(items), chunk_bytes="1MB")
    chunks, formats = compat.read_index(tmp_path)
    assert sum(chunk.num_items for chunk in chunks) == len(items), "index.json counts items in another way"
    for chunk in chunks:
        assert isinstance(chunk, compat.Chunk)
        size = (tmp_path / chunk.filename).stat().st_size
        assert size == chunk.num_bytes, f"chunk_bytes is {chunk.num_bytes}, but the file has {size}"
    assert set(formats) <= set(SAFE_FORMATS), f"litdata now writes arrays as {formats}"
    rows = compat.open_items(tmp_path)
    for index in (2, 0, 1):
        for name, values in items[index].items():
            assert np.array_equal(rows[index][name], values), f"item {index} came back changed"


def test_without_items_nothing_is_written(tmp_path: Path) -> None:
    compat.write_items(tmp_path, [], chunk_bytes="1MB")
    assert list(tmp_path.iterdir()) == []


def test_the_serializers_that_we_read_exist() -> None:
    assert set(SAFE_FORMATS) <= set(_SERIALIZERS), "litdata has renamed a serializer"


def test_what_reading_and_fetching_call() -> None:
    check_takes(StreamingDataset.__init__, "batch_decode", used_by=compat.open_items)
    check_takes(
        get_downloader, "remote_dir", "cache_dir", "chunks", "storage_options", used_by=compat.s3_fetcher
    )
    check_has(S3Downloader, "download_fileobj", used_by=compat.s3_fetcher)
    check_takes(S3Downloader.download_fileobj, "remote_filepath", "fileobj", used_by=compat.s3_fetcher)
