"""The values of rows as text."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpt_lightning.data.sources.corpus import HuggingFaceSource, JsonlSource, ParquetSource
from rpt_lightning.data.sources.row_text import as_text, fill_template, look_up


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("we612", "we612"),
        (b"we612", "we612"),
        (b"\xef\xbb\xbfna\xc3\xafve", "naïve"),
        (["one", "two"], "one|two"),
        ([b"one", "two"], "one|two"),
        (7, "7"),
        (0.00001, "0.00001"),
        (-1.5e-7, "-0.00000015"),
        (1e22, "10000000000000000000000"),
        (123456789012345680.0, "123456789012345680"),
        (10**30, "1" + 30 * "0"),
        (Decimal("1E-5"), "0.00001"),
        (Decimal("2.50"), "2.50"),
    ],
)
def test_what_a_value_says(value: Any, text: str) -> None:
    assert as_text(value, where="row 0", separator="|") == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"body": "x"},
            r"row 0: \{'body': 'x'\} \(dict\) is not text; name a field inside it, such as a dot and body",
        ),
        (["one", 2], r"row 0: \['one', 2\] \(list\) is not text"),
        ([["one"]], r"\(list\) is not text; name an entry of it"),
        ([], "row 0: an empty list"),
        (["one", None], r"\(list\) is not text"),
        (True, r"row 0: True \(bool\) is not text"),
        (float("nan"), "row 0: the number nan"),
        (float("-inf"), "row 0: the number -inf"),
        (b"\xff\xfe", r"row 0: bytes that are not UTF-8 \(byte 0\)"),
        (["one", b"\xff"], r"row 0, entry 1: bytes that are not UTF-8"),
        (object(), r"\(object\) is not text"),
    ],
)
def test_what_says_nothing(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_text(value, where="row 0")


def test_fields_inside_fields() -> None:
    row = {"meta": {"id": 3}, "meta.id": 4, "turns": [{"text": "a"}, {"text": "b"}]}
    assert [
        look_up(row, path)
        for path in ("meta.id", "turns.1.text", "turns.2.text", "turns.x", "meta.id.x", "no")
    ] == [
        4,
        "b",
        None,
        None,
        None,
        None,
    ]


def test_templates() -> None:
    row = {"turns": [{"text": "a"}], "n": 7, "p": 0.5}
    assert fill_template("{{{turns.0.text}}} {n:03d} {p:.2f} {p}", row, where="row 0") == "{a} 007 0.50 0.5"
    for template, message in (
        ("{n!r}", "!r writes a value as Python does"),
        ("{}", "empty braces"),
        ("{n", "expected '}'"),
        ("{turns.0.text:d}", r"row 0, field turns.0.text: 'a' cannot be written as 'd'"),
        (
            "{turns.0}",
            r"row 0, field turns.0: .* is not text; name a field inside it, such as a dot and text",
        ),
        ("{turns.1.text}", r"row 0: .* needs the field 'turns.1.text'"),
    ):
        with pytest.raises(ValueError, match=message):
            fill_template(template, row, where="row 0")


def test_columns_of_parquet(tmp_path) -> None:
    table = pa.table(
        {
            "body": pa.array([b"we612", "na\u00efve".encode()], pa.binary()),
            "solution": pa.array([["first", "second"], ["only"]]),
            "single": pa.array([0.1, 1e-5], pa.float32()),
            "half": pa.array([0.1, 2.0], pa.float16()),
            "price": pa.array([Decimal("1.10"), Decimal("2.00")], pa.decimal128(5, 2)),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "deep": pa.array([{"body": "p"}, {"body": "q"}]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")

    def texts(template: str, **more: str) -> list[str]:
        return [
            document.text
            for document in ParquetSource(str(tmp_path / "a.parquet"), template, **more).documents()
        ]

    assert texts("{body}") == ["we612", "naïve"]
    assert texts("{solution}") == ["first\n\nsecond", "only"]
    assert texts("{solution}", separator=" / ") == ["first / second", "only"]
    assert texts("{single} {half} {price} {kind} {deep.body}") == ["0.1 0.1 1.10 x p", "0.00001 2.0 2.00 y q"]
    with pytest.raises(ValueError, match=r"a\.parquet, row 0 \(from 0\), field deep: .*\(dict\) is not text"):
        texts("{deep}")


def test_rows_of_a_dataset(tmp_path) -> None:
    pytest.importorskip("datasets")
    table = pa.table(
        {
            "body": pa.array([b"we612"], pa.binary()),
            "x": pa.array([0.1], pa.float32()),
            "parts": pa.array([["a", "b"]]),
        }
    )
    pq.write_table(table, tmp_path / "train.parquet")
    (document,) = HuggingFaceSource(str(tmp_path), template="{body} {x} {parts}", separator="+").documents()
    assert document.text == "we612 0.1 a+b"


def test_a_separator_is_told_where_it_is_not_the_usual_one() -> None:
    """A folder that was prepared before this option existed is recognised."""
    assert JsonlSource("a.jsonl", "{text}").describe() == {
        "kind": "jsonl",
        "path": "a.jsonl",
        "template": "{text}",
    }
    assert JsonlSource("a.jsonl", "{text}", separator=" ").describe()["separator"] == " "
