"""The traceback of what ended a run, kept in its folder: on the terminal an error is one line, and a run of a week is not started again to see more."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path


@contextmanager
def traceback_kept(folder: Path, *, rank: int) -> Iterator[None]:
    """Appends the traceback of an exception to ``folder/error-RANK.txt`` and says so; the exception goes on. A folder that is not there is not made."""
    try:
        yield
    except Exception:
        # The error that counts may be a full disk: it must not be hidden behind one of its own kind.
        with suppress(OSError):
            if folder.is_dir():
                file = folder / f"error-{rank}.txt"
                with file.open("a", encoding="utf-8", errors="backslashreplace") as output:
                    output.write(
                        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC\n{traceback.format_exc()}\n"
                    )
                print(f"rpt: the traceback is in {file}", file=sys.stderr)
        raise
