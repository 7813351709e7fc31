"""Keeps the traceback of the error that ended a run in the run's folder.

The terminal shows only one line, and nobody wants to start a run of a week again to see more.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path


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
