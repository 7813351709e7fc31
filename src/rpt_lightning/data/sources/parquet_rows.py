"""Rows of Parquet files as Python values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rpt_lightning.data.sources.data_files import DataFile, find_files

ENDINGS = (".parquet", ".pq")
_ROWS_AT_ONCE = 1024


def read_parquet(path: str | Path, *, name: str) -> Iterator[tuple[DataFile, int, dict[str, Any]]]:
    """Yield ``(file, row from 0, values by column)`` of a file, a folder's files or the files of a pattern.

    Raises ValueError that names the file.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    for file in find_files(path, name=name, endings=ENDINGS):
        number = 0
        try:
            parquet = ParquetFile(file.path)
            types = {field.name: str(field.type) for field in parquet.schema_arrow}
            for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    yield file, number, with_short_numbers(row, types)
                    number += 1
        except (ArrowException, OSError) as error:
            raise ValueError(f"{file.path}: not a readable Parquet file ({error})") from error


def with_short_numbers(row: dict[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """Write a row's 16-bit and 32-bit floats with the fewest digits: 0.1, not 0.10000000149011612."""
    narrow = {"float": np.float32, "float32": np.float32, "halffloat": np.float16, "float16": np.float16}
    found = {
        key: narrow[types[key]]
        for key, value in row.items()
        if types.get(key) in narrow and isinstance(value, (float, np.floating))
    }
    return row | {key: float(str(number(row[key]))) for key, number in found.items()} if found else row
