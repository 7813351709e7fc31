"""What Lightning and its neighbours say that says nothing about a run: deprecations between libraries, an advertisement, bars of a second."""

from __future__ import annotations

import logging
import warnings

from transformers.utils.logging import disable_progress_bar

_NOISE = ("litlogger", "`Trainer(limit_val_batches=1.0)`")


def quieten_libraries() -> None:
    """For the rest of the process; for commands, not for who imports the package."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # vLLM initialises torch.distributed even in a single process; what is logged here is reduced over ranks before.
    warnings.filterwarnings("ignore", message=".*It is recommended to use .self.log.*sync_dist=True.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_says_something)
    disable_progress_bar()  # type: ignore[no-untyped-call]


def _says_something(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _NOISE)
