"""jsonargparse: parsed configurations and the parser of a subcommand. Tested with jsonargparse 4.53.0.

It does not import jsonargparse, because some commands that use it never parse anything.
"""

from __future__ import annotations

from typing import Any


def is_namespace(value: Any) -> bool:
    """Whether the value is jsonargparse's ``Namespace``.

    Relies on the class's name, and on ``vars`` of a namespace, which holds its values. A nested configuration
    is a namespace among them.
    """
    return type(value).__name__ == "Namespace"


def failed_parser(error: Exception | None, parser: Any) -> Any:
    """Return the parser whose arguments are wrong, which may be that of a subcommand of ``parser``.

    Relies on the attribute ``subcommand_parser``, which ``ArgumentParser`` sets on the exception that it
    passes to ``error``.
    """
    return getattr(error, "subcommand_parser", None) or parser
