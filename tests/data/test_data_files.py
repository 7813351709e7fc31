"""Files in the state in which people keep them: marks, compression, folders, patterns, ``~``."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpt_lightning.data.prepare.benchmark_overlap import benchmark_spans
from rpt_lightning.data.sources.corpus import JsonlSource, ParquetSource, TextFilesSource
from rpt_lightning.data.sources.questions import JsonlQuestions
from rpt_lightning.pretrained.token_bytes import TokenBytes

ROWS = [{"problem": f"Größe {number}?", "solution": "ja", "answer": number} for number in range(300)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TEXTS = [f"Größe {number}?" for number in range(300)]


def by_arrow(codec: str) -> Callable[[bytes], bytes]:
    def compress(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()

    return compress


FORMS: dict[str, bytes] = {
    "plain.jsonl": LINES.encode(),
    "notepad.jsonl": LINES.encode("utf-8-sig"),
    "powershell.jsonl": LINES.replace("\n", "\r\n").encode("utf-16"),
    "big-endian.jsonl": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "joined.jsonl": b"".join((line + "\n").encode("utf-8-sig") for line in LINES.splitlines()),
    "a.jsonl.gz": gzip.compress(LINES.encode("utf-8-sig")),
    "parts.jsonl.gz": b"".join(gzip.compress(line.encode()) for line in LINES.splitlines(keepends=True)),
    "a.jsonl.zst": by_arrow("zstd")(LINES.encode()),
    "parts.jsonl.zst": b"".join(by_arrow("zstd")(line.encode()) for line in LINES.splitlines(keepends=True)),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.jsonl.xz": lzma.compress(LINES.encode()),
    "a.jsonl.lz4": by_arrow("lz4")(LINES.encode()),
    "unpacked-by-the-browser.jsonl.gz": LINES.encode(),
    "packed-under-its-old-name.jsonl": gzip.compress(LINES.encode()),
    "c4-train.00000-of-01024.json.gz": gzip.compress(LINES.encode()),
    "list.json": json.dumps(ROWS, indent=2).encode("utf-8-sig"),
}


@pytest.mark.parametrize("name", FORMS)
def test_one_file_in_every_form(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    assert [document.text for document in JsonlSource(str(tmp_path / name), "{problem}").documents()] == TEXTS
    assert [question.text for question in JsonlQuestions(str(tmp_path / name)).questions()] == TEXTS
    if not name.endswith("list.json"):  # read as lines of text
        (document,) = TextFilesSource(str(tmp_path / name)).documents()
        assert document.text.replace("\ufeff", "") == LINES


def test_ids_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(FORMS["a.jsonl.gz"])
    assert [
        document.doc_id for document in JsonlSource(str(tmp_path / "a.jsonl.gz"), "{problem}").documents()
    ][:2] == [
        "a.jsonl.gz:1",
        "a.jsonl.gz:2",
    ]
    assert next(JsonlQuestions(str(tmp_path / "a.jsonl.gz")).questions()).question_id == "a:1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder under the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "data [v2]"
    for name, text in {
        "b.jsonl": "b",
        "a/x.jsonl.gz": "ax",
        "c/x.jsonl": "cx",
        ".cache/hidden.jsonl": "hidden",
        "README.md": "readme",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"problem": text, "answer": 1}).encode() + b"\n"
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


@pytest.mark.parametrize("path", ["{}", "~/data [v2]", "~/data [v2]/", "~/data ?v2?/**/*.jsonl*", "{}/a/../"])
def test_many_files(folder: Path, path: str) -> None:
    path = path.format(folder)
    documents = list(JsonlSource(path, "{problem}").documents())
    assert [document.text for document in documents] == ["ax", "b", "cx"]
    assert len({document.doc_id for document in documents}) == 3
    if "?" not in path:
        assert [document.doc_id for document in documents] == ["a/x.jsonl.gz:1", "b.jsonl:1", "c/x.jsonl:1"]
        assert [question.question_id for question in JsonlQuestions(path).questions()] == [
            "a/x:1",
            "b:1",
            "c/x:1",
        ]


def test_a_name_with_brackets_is_a_name_first(folder: Path) -> None:
    assert [document.text for document in JsonlSource("~/data [v2]/b.jsonl", "{problem}").documents()] == [
        "b"
    ]
    assert len(list(TextFilesSource("~/data [v2]").documents())) == 4


def test_a_link_that_leads_nowhere_is_not_passed_over(folder: Path) -> None:
    (folder / "c" / "gone.jsonl").symlink_to("blob")
    for path in ("~/data [v2]", "~/data ?v2?/*/*.jsonl"):
        with pytest.raises(ValueError, match=r"c/gone\.jsonl leads to no file"):
            list(JsonlSource(path, "{problem}").documents())


def test_files_that_are_not_there(folder: Path) -> None:
    (folder / "b.jsonl.gz").write_bytes((folder / "a/x.jsonl.gz").read_bytes())
    (folder / "only").mkdir()
    (folder / "only" / "notes.docx").write_bytes(b"PK\x03\x04")
    for path, message in {
        str(folder): r"--source\.init_args\.path .*b\.jsonl and b\.jsonl\.gz are the same file",
        f"{folder}/only": r"holds no file named \*\.jsonl or \*\.ndjson or \*\.json \(it holds notes\.docx\)",
        "~/nowhere/*.jsonl": "matches no file",
        "": "path '': empty; name a file, a folder or a pattern",
        "~/nowhere.jsonl": r"'~/nowhere\.jsonl': there is no such file",
        "~/data [v2]/only/notes.docx": "a zip archive, but text is needed there",
    }.items():
        with pytest.raises(ValueError, match=message):
            list(JsonlSource(path, "{problem}").documents())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (FORMS["a.jsonl.gz"][:-20], r"x\.jsonl: the compressed file is damaged or was cut off"),
        (FORMS["a.jsonl.zst"][:-20], r"x\.jsonl: the compressed file is damaged or was cut off"),
        (FORMS["a.jsonl.bz2"][:-20], r"x\.jsonl: the compressed file is damaged or was cut off"),
        (FORMS["a.jsonl.xz"][:-20], r"x\.jsonl: the compressed file is damaged or was cut off"),
        (FORMS["a.jsonl.gz"] + b"junk", r"x\.jsonl: the compressed file is damaged or was cut off"),
        (gzip.compress(b'{"problem": "\xff"}\n'), r"x\.jsonl, line 1: not UTF-8 \(byte 13 of the line\)"),
        ('{"problem": "a"}\n'.encode("utf-16") + b"\x00", r"x\.jsonl, line 2: not UTF-16 \(truncated data\)"),
        (
            b'{"problem": "a"}\n{"problem": ' + b"1" * 5000 + b"}",
            r"x\.jsonl, line 2: JSON that cannot be read",
        ),
        (b"[" * 100_000, r"x\.jsonl, line 1: JSON that cannot be read"),
        (b"PAR1...", r"x\.jsonl: a Parquet file"),
    ],
)
def test_damaged_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(JsonlSource(str(tmp_path / "x.jsonl"), "{problem}").documents())


def test_parquet_files_of_a_folder(folder: Path) -> None:
    for name in ("b/part-0.parquet", "a.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": [name]}), folder / name)
    source = ParquetSource("~/data [v2]", "{text}")
    assert [(document.doc_id, document.text) for document in source.documents()] == [
        ("a.parquet:0", "a.parquet"),
        ("b/part-0.parquet:0", "b/part-0.parquet"),
    ]


def test_benchmark_files_in_these_forms(folder: Path, tiny_tokenizer) -> None:
    question = (
        "How many of the seventeen green bottles are still hanging on the wall if eleven of them should fall?"
    )
    content = json.dumps({"q": question}).encode("utf-8-sig") + b"\n"
    (folder / "bench").mkdir()
    (folder / "bench" / "q.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "bench" / "q.txt").write_bytes(question.encode("utf-16"))
    token_bytes = TokenBytes(tiny_tokenizer)
    wanted = len(token_bytes.encode_plain(question)) - 12
    for path in ("~/data [v2]/bench", "~/data [v2]/bench/q.jsonl.gz", "~/data ?v2?/bench/*.txt"):
        assert len(benchmark_spans([path], token_bytes)[0]) == wanted
