"""Results that are already on disk: of a policy that was validated, or given with ``--against``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from rpt_lightning.evaluation.run_reader import Run, read_run

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Records(Generic[R]):
    """A kind of records, and where a run's folder has them. ``what`` names them in an error."""

    read_file: Callable[[Path], R]
    last_of: Callable[[Run], R | None]
    what: str

    def read(self, path: Path) -> R:
        """Read a file of records, or the last ones in the folder of a run or an evaluation.

        Raises ValueError if the folder has none.
        """
        if not path.is_dir():
            return self.read_file(path)
        results = self.last_of(read_run(path))
        if results is None:
            raise ValueError(f"{path}: holds no records of {self.what}")
        return results


def check_against(
    against: Path,
    before: Mapping[str, str],
    now: Mapping[str, str],
    *,
    others: str,
    same_flags: str,
    item: str,
    truth: str,
) -> None:
    """Check, before any policy spends hours on answers, that earlier results can be paired with the new ones.

    Args:
        against: Where the earlier results are.
        before: Their truths by id.
        now: The truths of what is asked now, by id.
        others: How an error describes the earlier results if the ids differ,
            e.g. "results at other positions (9)".
        same_flags: Flags that must be the same for the ids to be the same.
        item: Name of what has an id, e.g. "position".
        truth: Name of its truth, e.g. "truth".

    Raises:
        ValueError: The ids or the truths differ.
    """
    if unpaired := sorted(before.keys() ^ now.keys()):
        raise ValueError(
            f"--against {against}: these are {others} than the {len(now)} asked here, "
            f"for example {unpaired[0]!r}. Give the same {same_flags}"
        )
    for name, there in before.items():
        if there != now[name]:
            raise ValueError(
                f"--against {against}: {item} {name!r} has the {truth} {there!r} there, "
                f"but {now[name]!r} here"
            )
