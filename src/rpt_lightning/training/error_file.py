"""Keeps the traceback of the error that ended a run in the run's folder.

The terminal shows only one line, and nobody wants to start a run of a week again to see more.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def folder_named(folder: Path) -> Iterator[None]:
    """Turn an error of writing into the run folder into one that names the folder and the way out.

    Libraries that write there, such as TensorBoard, name neither.
    """
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        if error.errno not in _FULL and not name.startswith(f"{folder}{os.sep}"):
            raise
        raise RuntimeError(
            f"trainer.default_root_dir={folder}: the run cannot write there ({error}). Is the disk full, or "
            "was the folder deleted or moved? Make room or put the folder back; if it holds a checkpoint, "
            "continue with --ckpt_path last"
        ) from error


@contextmanager
def traceback_kept(folder: Path, *, rank: int) -> Iterator[None]:
    """Append the traceback of an exception to ``folder/error-RANK.txt``, say so, and re-raise.

    A missing folder is not created.
    """
    try:
        yield
    except Exception:
        # The error that counts may be a full disk. A second error of that kind must not hide it.
        with suppress(OSError):
            if folder.is_dir():
                file = folder / f"error-{rank}.txt"
                with file.open("a", encoding="utf-8", errors="backslashreplace") as output:
                    output.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n{traceback.format_exc()}\n")
                print(f"rpt: the traceback is in {file}", file=sys.stderr)
        raise
