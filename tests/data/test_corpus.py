from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpt_lightning.data.sources.corpus import (
    DocstringSource,
    HuggingFaceSource,
    JsonlSource,
    ParquetSource,
    TextFilesSource,
)

PACKAGE = '''
"""Module text is not a docstring of an object, however long it may be."""
import functools
from {name}.inner import Shared, helper

class Base:
    """The base class has a text that is long enough."""

    def method(self):
        """A method of the base class, long enough as well."""

    @property
    def size(self):
        """The size property has a text of its own here."""

    @functools.lru_cache
    def cached(self):
        """A cached method whose text sits behind a wrapper."""

class Child(Base):
    def method(self):
        pass

def _private():
    """Private objects are not part of what the source yields."""

def brief():
    """Short."""
'''
INNER = '''
class Shared:
    """Imported into two modules, it counts only once here."""

def helper():
    """Helper is defined in the inner module of the package."""
'''


def make_package(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(PACKAGE.replace("{name}", name))
    (folder / name / "inner.py").write_text(INNER)
    (folder / name / "broken.py").write_text("import a_module_that_does_not_exist\n")
    (folder / name / "exits.py").write_text("raise SystemExit(3)\n")


def test_docstrings_of_public_objects_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, "docstring_sample")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = DocstringSource("docstring_sample", min_chars=20)
    documents = list(source.documents())
    assert [document.doc_id for document in documents] == [
        "docstring_sample.Base",
        "docstring_sample.Base.cached",
        "docstring_sample.Base.method",
        "docstring_sample.Base.size",
        "docstring_sample.inner.Shared",
        "docstring_sample.inner.helper",
    ]
    assert documents[3].text == "The size property has a text of its own here."
    assert source.num_skipped_modules == 2
    assert list(source.documents()) == documents


def test_docstrings_of_a_missing_package() -> None:
    with pytest.raises(ValueError, match=r"package 'no_such_package_here'"):
        list(DocstringSource("no_such_package_here").documents())


def test_jsonl_fills_the_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "p1", "solution": "s1"}\n\n{"problem": "p2", "solution": "s2"}\n')
    documents = list(JsonlSource(str(path)).documents())
    assert [(document.doc_id, document.text) for document in documents] == [
        ("a.jsonl:1", "p1\n\ns1"),
        ("a.jsonl:3", "p2\n\ns2"),
    ]


def test_jsonl_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        '{"problem": "a\u2028b\x85c", "solution": "s"}\r\n{"problem": "p",\r "solution": "t"}\n'.encode()
    )
    assert [document.text for document in JsonlSource(str(tmp_path / "a.jsonl")).documents()] == [
        "a\u2028b\x85c\n\ns",
        "p\n\nt",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"problem": "p", "solution": "s"}\n{"problem": \n', r"a\.jsonl, line 2: broken JSON"),
        ('{"problem": "p"}\n', r"a\.jsonl, line 1: .*'solution'"),
        ('{"problem": "p", "solution": null}\n', r"a\.jsonl, line 1: .*'solution'"),
        ("[1]\n", r"a\.jsonl, line 1: a list"),
        (
            b'{"problem": "p", "solution": "s"}\n{"problem": "\xff", "solution": "s"}\n',
            r"a\.jsonl, line 2: not UTF-8 \(byte 13 of the line\)",
        ),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(JsonlSource(str(tmp_path / "a.jsonl")).documents())


def test_missing_files() -> None:
    with pytest.raises(ValueError, match="no such file"):
        list(JsonlSource("nowhere.jsonl").documents())
    with pytest.raises(ValueError, match="no such file"):
        list(ParquetSource("nowhere.parquet").documents())
    with pytest.raises(ValueError, match="matches no file"):
        list(TextFilesSource("nowhere/*.txt").documents())


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "a.parquet")
    documents = list(ParquetSource(str(tmp_path / "a.parquet"), template="{n}: {text}").documents())
    assert [document.text for document in documents] == ["1: one", "2: two"]
    with pytest.raises(ValueError, match=r"row 0.*'title'"):
        list(ParquetSource(str(tmp_path / "a.parquet"), template="{title}").documents())
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        list(ParquetSource(str(tmp_path / "b.parquet")).documents())


def test_text_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.text for document in TextFilesSource(f"{tmp_path}/**/*.txt").documents()] == [
        "a.txt",
        "b.txt",
        "sub/c.txt",
    ]
    (tmp_path / "d.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"d\.txt: not UTF-8"):
        list(TextFilesSource(f"{tmp_path}/*.txt").documents())


def test_hugging_face_dataset_from_a_local_folder(tmp_path: Path) -> None:
    """The same loader reads hub ids and folders of data files."""
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": "p", "solution": "s"}) + "\n")
    documents = list(HuggingFaceSource(str(tmp_path)).documents())
    assert [document.text for document in documents] == ["p\n\ns"]
