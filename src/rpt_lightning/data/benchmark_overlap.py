"""Documents that hold text of a benchmark would make its scores worthless."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.data.dedup import span_hashes
from rpt_lightning.tasks.token_bytes import TokenBytes


def benchmark_spans(paths: list[str], token_bytes: TokenBytes) -> NDArray[np.uint64]:
    """Sorted hashes of all 13-token spans of the files: every string inside JSONL records, or a whole text file. [S]

    Raises ValueError that names ``--benchmark_files`` and the file.
    """
    parts = []
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"--benchmark_files {path}: there is no such file")
        parts += [span_hashes(np.array(token_bytes.encode_plain(text), dtype=np.int32)) for text in _texts(Path(path))]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))


def overlaps(token_ids: NDArray[np.int32], spans: NDArray[np.uint64]) -> bool:
    """Whether any 13 tokens in a row are among the sorted ``spans``."""
    return bool(np.isin(span_hashes(token_ids), spans, assume_unique=False).any())


def _texts(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            yield from _strings(json.loads(line)) if line.strip() else ()
        except json.JSONDecodeError as error:
            raise ValueError(f"--benchmark_files {path}, line {number}: broken JSON ({error.msg})") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
