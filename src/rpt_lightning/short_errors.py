"""What a wrong flag says: the error and where help is. jsonargparse prints the usage before it, which for ``rpt fit`` is 200 lines."""

from __future__ import annotations

import sys
from typing import Any, NoReturn


class ShortErrors:
    """Beside one of jsonargparse's parsers, and before it."""

    prog: str
    exit_on_error: bool

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parent: Any = super()
        if not self.exit_on_error:
            parent.error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "").strip()
        print(f"rpt: error: {message.strip()}\nWhat can be set: {command} --help", file=sys.stderr)
        sys.exit(2)

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """Lightning calls it by its former name, which each time is a warning of six lines."""
        parent: Any = self
        return parent.instantiate(cfg, **kwargs)
