"""Silences messages of Lightning and other libraries that say nothing about a run.

These are deprecations between libraries, an advertisement, and progress bars that last a second.
"""

from __future__ import annotations

import logging
import warnings

from transformers.utils.logging import disable_progress_bar

from rpt_lightning.compat.lightning import MESSAGE_LOGGER

_NOISE = ("litlogger", "`Trainer(limit_val_batches=1.0)`")


def quieten_libraries() -> None:
    """Silence them for the rest of the process. For commands, not for programs that import the package."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # vLLM initialises torch.distributed even in a single process. Metrics are reduced over ranks before they
    # are logged.
    warnings.filterwarnings("ignore", message=".*It is recommended to use .self.log.*sync_dist=True.*")
    logging.getLogger(MESSAGE_LOGGER).addFilter(_says_something)
    disable_progress_bar()  # type: ignore[no-untyped-call]


def _says_something(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _NOISE)
