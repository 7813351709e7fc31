"""A run that cannot write its records ends, but only at the end of the step, with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class WriteErrors:
    """Keeps the first error of writing on this rank. ``first`` is None if there was none."""

    def __init__(self) -> None:
        self.first: RuntimeError | None = None

    @contextmanager
    def kept(self, what: str, *, step: int) -> Iterator[None]:
        """Keep the error of a block that writes ``what`` at a step."""
        try:
            yield
        except OSError as error:
            self.first = self.first or RuntimeError(
                f"cannot write {what} at step {step}: {error}. Is the disk full, or was the run folder "
                "deleted or moved during the run?"
            )
