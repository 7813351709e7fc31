"""Files of text as people have them: compressed, with a byte order mark, many at once, and under ``~``.

Compression and encoding are read from a file's first bytes, never from its name: browsers and scripts unpack files and keep the name, or the other way
round.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

# The first bytes of a compressed file, and pyarrow's name of what opens it; None: the standard library does.
_COMPRESSIONS: dict[bytes, str | None] = {
    b"\x1f\x8b": None,
    b"BZh": None,
    b"\xfd7zXZ\0": None,
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4")
# UTF-32's mark begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_TEXT = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive",
    b"ARROW1": "an Arrow file",
    b"7z\xbc\xaf": "a 7z archive",
}
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One of the files that a path names. ``name`` tells it from the others, on any machine.

    >>> DataFile(path=Path("/data/math/a.jsonl.gz"), name="math/a.jsonl.gz").stem
    'math/a'
    """

    path: Path
    name: str

    @property
    def stem(self) -> str:
        """The name without its endings."""
        return os.path.splitext(without_compression(self.name))[0]


def expand_home(path: str | Path) -> Path:
    """A path in which a leading ``~`` is the home folder: a shell replaces it in ``--flag ~/x`` only, neither in ``--flag=~/x`` nor in YAML."""
    return Path(os.path.expanduser(path))


def without_compression(name: str) -> str:
    """A file's name without ``.gz`` and the like."""
    root, ending = os.path.splitext(name)
    return root if ending.lower() in _COMPRESSED_ENDINGS else name


def find_files(path: str | Path, *, name: str, endings: Sequence[str], what: str = "file") -> list[DataFile]:
    """The files that a path names, in the order of their names: one file, all files of a folder with one of the ``endings``, or those of a pattern.

    A folder is searched at every depth, but for hidden files; endings may be followed by one of a compression. No ``endings``: all files. Raises
    ValueError that begins with ``name`` where there is none, or where a file lies there twice, compressed and not.
    """
    if not str(path):
        raise ValueError(f"{name}: empty; name a {what}, a folder or a pattern")
    whole = expand_home(path)
    if whole.is_file():
        return [DataFile(path=whole, name=whole.name)]
    if whole.is_dir():
        found = sorted(
            file for file in whole.rglob("*") if not file.is_dir() and not _is_hidden(file.relative_to(whole))
        )
        files = [
            file
            for file in found
            if not endings or without_compression(file.name).lower().endswith(tuple(endings))
        ]
        if not files:
            held = (
                f"it holds {found[0].relative_to(whole)}"
                + (f" and {len(found) - 1} more" if len(found) > 1 else "")
                if found
                else "it is empty"
            )
            raise ValueError(
                f"{name}: the folder holds no {what} named *{' or *'.join(endings)} ({held}); name the files by a pattern"
            )
        root = whole
    elif glob.has_magic(str(whole)):
        files = [
            Path(match) for match in sorted(glob.glob(str(whole), recursive=True)) if not Path(match).is_dir()
        ]
        if not files:
            raise ValueError(f"{name}: the pattern matches no file")
        root = _fixed_part(whole)
    else:
        raise ValueError(f"{name}: there is no such {what}")
    seen: dict[str, Path] = {}
    for file in files:
        if not file.is_file():  # a link of a hub's cache, say, whose file was deleted
            raise ValueError(f"{name}: {file} leads to no file; restore or remove it")
        other = seen.setdefault(without_compression(str(file)), file)
        if other is not file:
            raise ValueError(
                f"{name}: {other} and {file.name} are one file twice, compressed and not; remove one of the two or name the other"
            )
    return [DataFile(path=file, name=file.relative_to(root).as_posix()) for file in files]


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _fixed_part(pattern: Path) -> Path:
    """The folder before the first part with a wildcard."""
    fixed = Path(pattern.parts[0]) if pattern.is_absolute() else Path()
    for part in pattern.parts[1 if pattern.is_absolute() else 0 : -1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed


def read_text(path: Path, *, name: str) -> str:
    r"""All of a file, decompressed and without its byte order mark; lines end with ``\n``. Raises ValueError that begins with ``name``."""
    with _opened(path, name) as file:
        encoding = _encoding(file)
        try:
            text = file.read().decode(encoding)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: not {_spelled(encoding)} (byte {error.start}); convert the file or leave it out"
            ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path, *, name: str) -> Iterator[tuple[int, str]]:
    r"""``(number from 1, text)`` of every line, which ends at ``\n`` alone. Raises ValueError that begins with ``name`` and the line."""
    with _opened(path, name) as file:
        encoding = _encoding(file)
        if encoding != "utf-8-sig":
            yield from _wide_lines(file, encoding, name)
            return
        for number, line in enumerate(file, start=1):
            try:
                # Files that were put together of several may have marks in the middle.
                yield number, line.decode(encoding)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{name}, line {number}: not UTF-8 (byte {error.start} of the line); convert the file"
                ) from error


def _wide_lines(file: io.BufferedReader, encoding: str, name: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for line in io.TextIOWrapper(file, encoding=encoding, newline="\n"):
            number += 1
            yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}, line {number + 1}: not {_spelled(encoding)} ({error.reason}); convert the file"
        ) from error


def _encoding(file: io.BufferedReader) -> str:
    """By the byte order mark: Windows' editors write UTF-8's, its PowerShell UTF-16."""
    beginning = file.peek(4)
    return next((encoding for mark, encoding in _MARKS.items() if beginning.startswith(mark)), "utf-8-sig")


def _spelled(encoding: str) -> str:
    return encoding.upper().removesuffix("-SIG")


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[io.BufferedReader]:
    """The decompressed bytes. What is raised while they are read names the file."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        beginning = file.peek(8)[:8]
        kind = next((kind for start, kind in _NO_TEXT.items() if beginning.startswith(start)), None)
        if kind is not None:
            raise ValueError(
                f"{name}: {kind}, and text belongs there; unpack it, or name the source that reads such files"
            )
        try:
            yield _decompressed(file, beginning, stack)
        except _BROKEN as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the content
                raise
            raise ValueError(
                f"{name}: the compressed file is damaged or was cut off ({error}); copy it anew"
            ) from error


def _decompressed(
    file: io.BufferedReader, beginning: bytes, stack: contextlib.ExitStack
) -> io.BufferedReader:
    magic = next((magic for magic in _COMPRESSIONS if beginning.startswith(magic)), None)
    stream: Any
    if magic is None or (
        magic == b"BZh" and beginning[4:8] != b"1AY&"
    ):  # a text may begin with these three letters
        return file
    if magic == b"\x1f\x8b":
        stream = gzip.GzipFile(fileobj=file)
    elif magic == b"BZh":
        stream = bz2.BZ2File(file)
    elif magic == b"\xfd7zXZ\0":
        stream = lzma.LZMAFile(file)  # noqa: SIM115 (closed by the stack)
    else:
        from pyarrow import CompressedInputStream, PythonFile

        stream = CompressedInputStream(PythonFile(cast(BinaryIO, file), mode="r"), _COMPRESSIONS[magic])
    return io.BufferedReader(stack.enter_context(stream))
