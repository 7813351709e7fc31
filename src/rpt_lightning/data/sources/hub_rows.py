"""Rows of a dataset that Hugging Face's ``datasets`` reads from the hub or from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rpt_lightning.data.sources.data_files import expand_home
from rpt_lightning.data.sources.parquet_rows import with_short_numbers


def read_dataset(
    name: str, config_name: str | None, *, split: str, revision: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split in order. Raises ValueError if ``datasets`` is not installed."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"dataset {name}: reading it needs the datasets package: pip install 'datasets>=3'"
        ) from error
    path = str(expand_home(name)) if name.startswith("~") else name
    rows = load_dataset(path, config_name, split=split, revision=revision)
    types = {
        field: str(getattr(feature, "dtype", ""))
        for field, feature in (getattr(rows, "features", None) or {}).items()
    }
    for row in rows:
        yield with_short_numbers(row, types)
