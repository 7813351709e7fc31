"""Silences messages of Lightning and other libraries that say nothing about a run.

These are deprecations between libraries, an advertisement, and progress bars that last a second.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
import warnings
from collections.abc import Callable

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
    threading.excepthook = _without_tensorboard(threading.excepthook)


def _without_tensorboard(
    hook: Callable[[threading.ExceptHookArgs], object],
) -> Callable[[threading.ExceptHookArgs], None]:
    """Leave out errors of TensorBoard's writing thread. It raises them again where the run writes next."""
    writer = os.path.join("tensorboard", "summary", "writer")

    def show(args: threading.ExceptHookArgs) -> None:
        frames = traceback.walk_tb(args.exc_traceback)
        if not any(writer in frame.f_code.co_filename for frame, _ in frames):
            hook(args)

    return show


def _says_something(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _NOISE)
