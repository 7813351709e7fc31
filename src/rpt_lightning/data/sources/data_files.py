"""Text files in the state in which people keep them.

They may be compressed, begin with a byte order mark, come in groups, or be named with ``~``. Compression and
encoding are read from a file's first bytes, never from its name: browsers and scripts unpack files and keep
the name, or rename files without unpacking them.
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

# The first bytes of a compressed file and pyarrow's name for its format. None: the standard library reads it.
_COMPRESSIONS: dict[bytes, str | None] = {
    b"\x1f\x8b": None,
    b"BZh": None,
    b"\xfd7zXZ\0": None,
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4")
# Order matters: the mark of UTF-32 begins with that of UTF-16.
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
    """One of the files that a path names. ``name`` identifies it among them on any machine.

    >>> DataFile(path=Path("/data/math/a.jsonl.gz"), name="math/a.jsonl.gz").stem
    'math/a'
    """

    path: Path
    name: str

    @property
    def stem(self) -> str:
        """The name without its extensions."""
        return os.path.splitext(without_compression(self.name))[0]


def expand_home(path: str | Path) -> Path:
    """Replace a leading ``~`` with the home folder.

    A shell does so only in ``--flag ~/x``, not in ``--flag=~/x``. YAML does not do so either.
    """
    return Path(os.path.expanduser(path))


def without_compression(name: str) -> str:
    """Return a file's name without ``.gz`` and the like."""
    root, ending = os.path.splitext(name)
    return root if ending.lower() in _COMPRESSED_ENDINGS else name


def find_files(path: str | Path, *, name: str, endings: Sequence[str], what: str = "file") -> list[DataFile]:
    """List the files that a path names, sorted by name.

    The path may be one file, a folder or a pattern. A folder stands for all files in it, at any depth, with
    one of the ``endings``. Hidden files are skipped. A compression's extension may follow an ending. Without
    ``endings`` all files count. Raises ValueError that begins with ``name`` if there is no file, or if a file
    is there twice, compressed and uncompressed.
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
                f"{name}: the folder holds no {what} named *{' or *'.join(endings)} ({held}); "
                "name the files by a pattern"
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
        if not file.is_file():  # for example, a link in a hub cache whose file was deleted
            raise ValueError(f"{name}: {file} leads to no file; restore or remove it")
        other = seen.setdefault(without_compression(str(file)), file)
        if other is not file:
            raise ValueError(
                f"{name}: {other} and {file.name} are the same file, compressed and uncompressed; "
                "remove one of the two or name the other"
            )
    return [DataFile(path=file, name=file.relative_to(root).as_posix()) for file in files]


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _fixed_part(pattern: Path) -> Path:
    """Return the folder before the first part with a wildcard."""
    fixed = Path(pattern.parts[0]) if pattern.is_absolute() else Path()
    for part in pattern.parts[1 if pattern.is_absolute() else 0 : -1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed


def read_text(path: Path, *, name: str) -> str:
    r"""Read a whole file, decompressed and without its byte order mark, with lines that end with ``\n``.

    Raises ValueError that begins with ``name``.
    """
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
    r"""Yield ``(number from 1, text)`` of every line. Only ``\n`` ends a line.

    Raises ValueError that begins with ``name`` and the line.
    """
    with _opened(path, name) as file:
        encoding = _encoding(file)
        if encoding != "utf-8-sig":
            yield from _wide_lines(file, encoding, name)
            return
        for number, line in enumerate(file, start=1):
            try:
                # Files concatenated from several may have marks in the middle.
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
    """Read the encoding from the byte order mark: Windows editors write UTF-8's, PowerShell UTF-16's."""
    beginning = file.peek(4)
    return next((encoding for mark, encoding in _MARKS.items() if beginning.startswith(mark)), "utf-8-sig")


def _spelled(encoding: str) -> str:
    return encoding.upper().removesuffix("-SIG")


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[io.BufferedReader]:
    """Open the decompressed bytes. Errors while they are read name the file."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        beginning = file.peek(8)[:8]
        kind = next((kind for start, kind in _NO_TEXT.items() if beginning.startswith(start)), None)
        if kind is not None:
            raise ValueError(
                f"{name}: {kind}, but text is needed there; "
                "unpack it, or name the source that reads such files"
            )
        try:
            yield _decompressed(file, beginning, stack)
        except _BROKEN as error:
            # An errno marks an error of the disk, not of the content.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(
                f"{name}: the compressed file is damaged or was cut off ({error}); copy it again"
            ) from error


def _decompressed(
    file: io.BufferedReader, beginning: bytes, stack: contextlib.ExitStack
) -> io.BufferedReader:
    magic = next((magic for magic in _COMPRESSIONS if beginning.startswith(magic)), None)
    stream: Any
    # Plain text may begin with the three letters of bzip2.
    if magic is None or (magic == b"BZh" and beginning[4:8] != b"1AY&"):
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
