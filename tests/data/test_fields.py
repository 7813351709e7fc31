"""What a source knows about a document, followed from characters to stored positions and tasks."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy_tokenizers as toys
from folder_contents import Prepare, items, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_lightning.data.prepare.tokenized_corpus import source_sha256
from rpt_lightning.data.sources.corpus import CorpusSource, HuggingFaceSource, JsonlSource, ParquetSource
from rpt_lightning.data.sources.fields import check_document, token_fields
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Document, Mark

TOKENS = [TokenBytes(toys.byte_level()), TokenBytes(toys.byte_fallback())]
TEXT = st.text(st.sampled_from("ab 1é漢😀▁\n"), min_size=1, max_size=12)


def character_of_each_token(text: str, token_ids: tuple[int, ...], token_bytes: TokenBytes) -> list[int]:
    """Find the index of the character in which each token begins, byte by byte."""
    owner = [
        index for index, character in enumerate(token_bytes.plain_text(text)) for _ in character.encode()
    ]
    starts = [len(token_bytes.join(token_ids[:k])) for k in range(len(token_ids))]
    return [owner[start] for start in starts]


@pytest.mark.parametrize("token_bytes", TOKENS, ids=["byte_level", "byte_fallback"])
@given(text=TEXT, data=st.data())
@settings(max_examples=150)
def test_a_token_has_the_fields_of_every_mark_in_which_it_begins(
    token_bytes: TokenBytes, text: str, data: st.DataObject
) -> None:
    ends = (
        st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))
        .map(sorted)
        .filter(lambda pair: pair[0] < pair[1])
    )
    spans = data.draw(st.lists(ends, max_size=4))
    marks = tuple(
        Mark(start=start, end=end, fields={"mark": k, f"has {k}": 1}) for k, (start, end) in enumerate(spans)
    )
    document = Document(doc_id="d", text=text, fields={"mark": "none"}, marks=marks)
    token_ids = token_bytes.encode_plain(text)
    found = token_fields(document, token_ids, token_bytes, num_kept=len(token_ids))
    assert found is not None
    rows = found.at(np.arange(len(token_ids), dtype=np.int32))
    expected = []
    for character in character_of_each_token(text, token_ids, token_bytes):
        row: dict[str, Any] = {"mark": "none"}
        for mark in marks:
            if mark.start <= character < mark.end:
                row |= mark.fields
        expected.append(row)
    assert rows == expected
    seen = {name for row in expected for name in row}
    assert found.num_without_token == sum(f"has {k}" not in seen for k in range(len(marks)))


def test_by_hand() -> None:
    """Byte fallback gives an unknown character one token per byte: ж is two, and both begin in its mark."""
    token_bytes = TOKENS[1]
    text = "語ж🙂"
    token_ids = token_bytes.encode_plain(text)
    lengths = [len(token_bytes[token]) for token in token_ids]
    assert lengths == [1] * 9
    document = Document(doc_id="d", text=text, marks=(Mark(start=1, end=2, fields={"depth": 2}),))
    found = token_fields(document, token_ids, token_bytes, num_kept=9)
    assert found is not None
    assert found.at(np.arange(9, dtype=np.int32)) == [{}] * 3 + [{"depth": 2}] * 2 + [{}] * 4
    assert found.at(np.array([2, 4, 8], dtype=np.int32)) == [{}, {"depth": 2}, {}]
    cut = token_fields(document, token_ids, token_bytes, num_kept=3)
    assert cut is not None
    assert (
        cut.num_marks,
        cut.num_without_token,
        cut.num_behind_cut,
        cut.at(np.arange(3, dtype=np.int32)),
    ) == (1, 0, 1, None)
    assert token_fields(replace(document, marks=()), token_ids, token_bytes, num_kept=9) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fields": {"good": True}},
            "document 'd': the field 'good' must be text or a finite number, but True is a bool",
        ),
        ({"fields": {"x": float("nan")}}, "the field 'x' .*nan is not finite"),
        ({"fields": {"x": float("-inf")}}, "the field 'x' .*-inf is not finite"),
        ({"fields": {"x": None}}, "the field 'x' .*None is a NoneType"),
        ({"fields": {"x": [1]}}, r"the field 'x' .*\[1\] is a list"),
        ({"fields": {"x": np.int64(3)}}, "the field 'x' .*is a int64"),
        ({"fields": {"x": "\ud800"}}, "the field 'x' .*is not Unicode"),
        ({"fields": {3: "x"}}, "the name of a field is 3"),
        ({"fields": {"": "x"}}, "the name of a field is ''"),
        ({"fields": "depth"}, "its fields are a str"),
        ({"text": b"abc"}, "its text is a bytes"),
        (
            {"marks": (Mark(start=0, end=2), Mark(start=1, end=4))},
            r"document 'd', mark 1 \(characters 1 to 4\): is empty, or not inside .* 3 characters",
        ),
        ({"marks": (Mark(start=2, end=2),)}, r"mark 0 \(characters 2 to 2\): is empty"),
        ({"marks": (Mark(start=-1, end=2),)}, r"mark 0 \(characters -1 to 2\)"),
        (
            {"marks": (Mark(start=0, end=1, fields={"x": False}),)},
            r"mark 0 \(characters 0 to 1\): the field 'x' .*False is a bool",
        ),
    ],
)
def test_what_cannot_be_a_field(change: dict[str, Any], message: str) -> None:
    good = Document(
        doc_id="d",
        text="abc",
        fields={"a": 1, "b": "text", "c": -0.5},
        marks=(Mark(start=0, end=3, fields={"a": 2}),),
    )
    check_document(good, number=1)
    with pytest.raises(ValueError, match=message):
        check_document(replace(good, **change), number=1)


class Listed(CorpusSource):
    """A source that yields the given documents."""

    def __init__(self, documents: list[Document]) -> None:
        self.listed = documents

    def documents(self) -> Iterator[Document]:
        return iter(self.listed)

    def describe(self) -> dict[str, Any]:
        return {"kind": "listed"}


def test_the_fingerprint_is_of_fields_and_marks_too() -> None:
    plain = Document(doc_id="d", text="abc")
    mark = Mark(start=0, end=1, fields={"depth": 1}, thought="because")
    documents = [
        plain,
        replace(plain, fields={"depth": 1}),
        replace(plain, fields={"depth": 2}),
        replace(plain, fields={"depth": "1"}),
        replace(plain, marks=(mark,)),
        replace(plain, marks=(replace(mark, end=2),)),
        replace(plain, marks=(replace(mark, fields={"depth": 2}),)),
        replace(plain, marks=(replace(mark, thought=None),)),
    ]
    assert len({source_sha256(Listed([document])) for document in documents}) == len(documents)
    both, turned = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert source_sha256(Listed([replace(plain, fields=both)])) == source_sha256(
        Listed([replace(plain, fields=turned)])
    )
    # The hash from before fields existed covers id and text, each followed by a zero byte.
    assert source_sha256(Listed([plain])) == hashlib.sha256(b"d\0abc\0").hexdigest()


def marked_documents() -> list[Document]:
    """Make twelve documents.

    The first ten have a marked word each, some with letters of several bytes. The last two have no fields.
    """
    rng = random.Random(1)
    documents = []
    for number in range(12):
        words = ["".join(rng.choices("abcdefghijklmnopé漢", k=5)) for _ in range(14)]
        text = " ".join(words)
        start = len(" ".join(words[:9]))  # the word includes the space before it
        mark = Mark(start=start, end=start + 6, fields={"depth": number % 3, "kind": "answer"})
        known = {"fields": {"kind": "text", "world": "cups"}, "marks": (mark,)} if number < 10 else {}
        documents.append(Document(doc_id=f"doc {number}", text=text, **known))
    return documents


@pytest.fixture(scope="module")
def marked_folder(prepare_small: Prepare, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("tasks") / "marked", source=Listed(marked_documents()))


def test_fields_reach_the_tasks(marked_folder: Path) -> None:
    known = {document.doc_id: document for document in marked_documents()}
    num_marked = 0
    for split in ("train", "heldout"):
        folder = TaskFolder(marked_folder, split)  # type: ignore[arg-type]
        for index in range(len(folder)):
            document, token_ids = known[folder.document(index)["doc_id"]], folder.token_ids(index)
            characters = character_of_each_token(document.text, token_ids, folder.token_bytes)
            for k in range(int(folder.num_positions[index])):
                task = folder.task(index, k)
                expected = dict(document.fields)
                for mark in document.marks:
                    if mark.start <= characters[task.position] < mark.end:
                        expected |= mark.fields
                        num_marked += 1
                assert task.fields == expected
                assert hash(task) == hash(replace(task, fields={}))
    assert num_marked > 20
    everything = items(marked_folder) | items(marked_folder, "heldout")
    assert {doc_id for doc_id, item in everything.items() if item["fields"] is None} == {"doc 10", "doc 11"}


def test_the_manifest_counts_fields_and_marks(
    prepare_small: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str], marked_folder: Path
) -> None:
    manifest = json.loads((marked_folder / "manifest.json").read_text())
    assert {
        name: manifest["corpus"][name]
        for name in ("marks", "marks_in_which_no_token_begins", "marks_behind_the_cut")
    } == {
        "marks": 10,
        "marks_in_which_no_token_begins": 0,
        "marks_behind_the_cut": 0,
    }
    counted = manifest["splits"]["train"]["fields"]
    rows = [row for item in items(marked_folder).values() for row in item["fields"] or ()]
    assert counted == {name: sum(name in row for row in rows) for name in ("depth", "kind", "world")}
    assert 0 < counted["depth"] < counted["kind"] == counted["world"]
    documents = marked_documents()
    # The tokenizer makes "é" of two bytes either one token or two. No character ends between its bytes, so a
    # mark in which no token begins lies inside a merged token.
    tokens = TaskFolder(marked_folder, "train").token_bytes
    text = documents[0].text
    inside = next(
        k
        for k in range(1, len(text))
        if k not in character_of_each_token(text, tokens.encode_plain(text), tokens)
    )
    documents[0] = replace(
        documents[0], marks=(Mark(start=inside, end=inside + 1, fields={"depth": 9}), *documents[0].marks)
    )
    capsys.readouterr()
    prepare_small(tmp_path / "odd", source=Listed(documents), max_tokens_per_document=40)
    said = capsys.readouterr().out
    assert "1 of 11 marks have no effect: no token begins in them" in said
    assert "10 of 11 marks have no effect: they lie beyond --max_tokens_per_document 40" in said
    assert "fields kept at positions: kind, world" in said


def test_a_folder_without_fields_has_the_same_shards(
    marked_folder: Path, prepare_small: Prepare, tmp_path: Path
) -> None:
    plain = prepare_small(
        tmp_path / "plain", source=Listed([replace(one, fields={}, marks=()) for one in marked_documents()])
    )
    assert all("fields" not in item for item in items(plain).values())
    assert "fields" not in json.loads((plain / "manifest.json").read_text())["splits"]["train"]
    assert TaskFolder(plain, "train").layout == TaskFolder(marked_folder, "train").layout
    assert TaskFolder(plain, "train").task(0, 0).fields == {}
    thoughts = [
        replace(one, fields={}, marks=(Mark(start=0, end=3, thought="so"),)) for one in marked_documents()
    ]
    assert (
        stored(prepare_small(tmp_path / "thoughts", source=Listed(thoughts)))["chunks"]
        == stored(plain)["chunks"]
    )
    with pytest.raises(ValueError, match="a task folder made with different text of --source"):
        prepare_small(plain, source=Listed(marked_documents()))


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> list[CorpusSource]:
    """Write the same rows for every kind of source that has columns."""
    names = ["depth", "world"]
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return [
        JsonlSource(str(folder / "a.jsonl"), template="{text}", fields=names),
        ParquetSource(str(folder / "a.parquet"), template="{text}", fields=names),
    ]


def test_columns_are_kept_as_fields(tmp_path: Path) -> None:
    rows = [{"text": "one", "depth": 1, "world": "cups"}, {"text": "two", "depth": 12, "world": "people"}]
    for source in write_rows(tmp_path / "rows", rows):
        assert [document.fields for document in source.documents()] == [
            {"depth": 1, "world": "cups"},
            {"depth": 12, "world": "people"},
        ]
        assert source.describe()["fields"] == ["depth", "world"]
    assert "fields" not in JsonlSource("a.jsonl").describe()  # as in older folders


def test_a_dot_leads_into_nested_columns(tmp_path: Path) -> None:
    rows = [{"text": "one", "depth": 1, "world": "cups", "about": {"levels": [3, 4]}}]
    for source in write_rows(tmp_path / "rows", rows):
        source.fields = ["about.levels.1"]  # type: ignore[attr-defined]
        assert [document.fields for document in source.documents()] == [{"about.levels.1": 4}]
        for name, problem in (
            ("about.levels.2", "missing or null there"),
            ("about.levels", r"\[3, 4\] is a list"),
        ):
            source.fields = [name]  # type: ignore[attr-defined]
            with pytest.raises(ValueError, match=f"the field '{name}' is to be kept, .*{problem}"):
                list(source.documents())


def test_columns_of_a_dataset_are_kept_as_fields(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "one", "depth": 1.5}) + "\n")
    source = HuggingFaceSource(str(tmp_path), template="{text}", fields=["depth"])
    assert [document.fields for document in source.documents()] == [{"depth": 1.5}]
    assert source.describe()["fields"] == ["depth"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"depth": None, "world": "cups"},
            r"the field 'depth' is to be kept, but is missing or null there \(fields: text, depth, world\)",
        ),
        (
            {"depth": [1], "world": "cups"},
            r"the field 'depth' is to be kept, so it must be text or a finite number, but \[1\] is a list",
        ),
        ({"depth": True, "world": "cups"}, "the field 'depth' .*True is a bool"),
        ({"depth": float("nan"), "world": "cups"}, "the field 'depth' .*nan is not finite"),
        ({"depth": 3}, "the field 'world' is to be kept, but is missing"),
    ],
)
def test_a_column_that_cannot_be_kept_names_the_row(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    jsonl, parquet = write_rows(tmp_path / "rows", [{"text": "one"} | row])
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 1: {message}"):
        list(jsonl.documents())
    with pytest.raises(ValueError, match=rf"a\.parquet, row 0 \(from 0\): {message}"):
        list(parquet.documents())


def test_stored_fields_that_are_not_those_of_the_positions(marked_folder: Path) -> None:
    from rpt_lightning.data.store.item_format import decode_item, encode_item

    item = TaskFolder(marked_folder, "train").document(0)
    for wrong in ([], [1] * len(item["positions"]), {"depth": 1}):
        with pytest.raises(ValueError, match="its stored fields are not one object per position"):
            decode_item(encode_item(item | {"fields": wrong}))
