"""Short messages for wrong flags: the error, and where to find help.

jsonargparse prints the usage before the error, which for ``rpt fit`` is 200 lines.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from rpt_lightning.compat.jsonargparse import failed_parser


class ShortErrors:
    """Mixin for a parser of jsonargparse. List it first among the bases."""

    prog: str
    exit_on_error: bool

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parent: Any = super()
        if not self.exit_on_error:
            parent.error(message, ex)
        command = failed_parser(ex, self).prog.replace(" [options]", "").strip()
        print(f"rpt: error: {message.strip()}\nWhat can be set: {command} --help", file=sys.stderr)
        sys.exit(2)

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """Forward to ``instantiate``.

        Lightning calls it by its former name, which gives a warning of six lines each time.
        """
        parent: Any = self
        return parent.instantiate(cfg, **kwargs)
