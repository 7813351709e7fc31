from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.data.prepare.benchmark_overlap import benchmark_spans, overlaps
from rpt_lightning.data.prepare.dedup import span_hashes
from rpt_lightning.pretrained.token_bytes import TokenBytes

QUESTION = (
    "How many of the seventeen green bottles are still hanging on the wall "
    "if eleven of them should accidentally fall?"
)


@pytest.fixture(scope="module")
def token_bytes(tiny_tokenizer: Any) -> TokenBytes:
    return TokenBytes(tiny_tokenizer)


def tokens(token_bytes: TokenBytes, text: str) -> Any:
    return np.array(token_bytes.encode_plain(text), dtype=np.int32)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps({"question": QUESTION}) + "\n"),
        ("a.jsonl", json.dumps({"id": "one\u2028line", "question": QUESTION}, ensure_ascii=False) + "\n"),
        ("a.json", json.dumps([{"question": "short"}, {"parts": [QUESTION]}], indent=2)),
        ("a.txt", QUESTION),
    ],
)
def test_every_form_of_a_benchmark_file_is_found(
    token_bytes: TokenBytes, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    spans, num_skipped = benchmark_spans([str(tmp_path / name)], token_bytes)
    # The spans are of the text itself, not of its JSON. In a list of records the quotes and names around it
    # would give other tokens.
    assert len(spans) == len(tokens(token_bytes, QUESTION)) - 12
    assert num_skipped == 0
    assert overlaps(tokens(token_bytes, QUESTION), spans)
    assert not overlaps(tokens(token_bytes, QUESTION[::-1]), spans)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": "a"}\n{"q": \n', r"--benchmark_files .*a\.jsonl, line 2: broken JSON"),
        ("a.jsonl", b'{"q": "a"}\n{"q": "\xff"}\n', r"--benchmark_files .*a\.jsonl, line 2: not UTF-8"),
        ("a.json", b'[{"q": "a"},\n {"q": ]', r"--benchmark_files .*a\.json, line 2: broken JSON"),
        (
            "a.json",
            b'{"q": "a"}\n{"q": "b"}\n',
            r"--benchmark_files .*a\.json, line 2: broken JSON .*\.jsonl",
        ),
        ("a.txt", b"caf\xe9", r"--benchmark_files .*a\.txt: not UTF-8 \(byte 3\)"),
    ],
)
def test_bad_files_are_named(
    token_bytes: TokenBytes, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        benchmark_spans([str(tmp_path / name)], token_bytes)


@given(st.integers(0, 10_000), st.integers(0, 40), st.integers(0, 30))
def test_a_document_overlaps_where_any_of_its_spans_is_among_the_others(
    seed: int, num_spans: int, length: int
) -> None:
    """It must also work without any spans, and with the smallest and the largest hash."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 3, length).astype(np.int32)
    hashes = span_hashes(ids)
    largest = np.iinfo(np.uint64).max
    others = np.concatenate(
        [hashes, rng.integers(0, largest, 40, dtype=np.uint64), np.array([0, largest], dtype=np.uint64)]
    )
    spans = np.unique(rng.choice(others, num_spans))
    assert overlaps(ids, spans) == bool(set(hashes.tolist()) & set(spans.tolist()))
