"""Find documents that hold text of a benchmark. Training on them would make its scores worthless."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.data.prepare.dedup import span_hashes
from rpt_lightning.data.sources.data_files import DataFile, find_files, read_text, without_compression
from rpt_lightning.data.sources.jsonl import read_json, read_jsonl
from rpt_lightning.pretrained.token_bytes import TokenBytes

# A constant of its own: --dedup_span applies to the split. A corpus made from templates needs no other number
# here, since benchmarks do not share the templates.
BENCHMARK_SPAN = 13


def benchmark_spans(paths: list[str], token_bytes: TokenBytes) -> tuple[NDArray[np.uint64], int]:
    """Hash all 13-token spans of the files.

    A text is every string inside JSON or JSONL records, or a whole file of another kind. A path may be a
    folder or a pattern. Returns the sorted hashes [S] and the number of texts that the tokenizer cannot
    express. No document can hold such a text. Raises ValueError that names ``--benchmark_files`` and the
    file.
    """
    parts, num_skipped = [], 0
    files = [
        file for path in paths for file in find_files(path, name=f"--benchmark_files {path}", endings=())
    ]
    for file in files:
        for text in _texts(file):
            try:
                token_ids = token_bytes.encode_plain(text)
            except ValueError:
                num_skipped += 1
            else:
                parts.append(span_hashes(np.array(token_ids, dtype=np.int32), BENCHMARK_SPAN))
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts])), num_skipped


def overlaps(token_ids: NDArray[np.int32], spans: NDArray[np.uint64]) -> bool:
    """Whether any 13 consecutive tokens are among the sorted ``spans``."""
    if not len(spans):
        return False
    hashes = span_hashes(token_ids, BENCHMARK_SPAN)
    places = np.searchsorted(spans, hashes)  # np.isin would sort the spans again for every document
    return bool((spans[np.minimum(places, len(spans) - 1)] == hashes).any())


def _texts(file: DataFile) -> Iterator[str]:
    name = f"--benchmark_files {file.path}"
    kind = without_compression(file.name).lower()
    if kind.endswith((".jsonl", ".ndjson")):
        for _, value in read_jsonl(file.path, name=name):
            yield from _strings(value)
    elif kind.endswith(".json"):
        yield from _strings(read_json(file.path, name=name))
    else:
        yield read_text(file.path, name=name)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
