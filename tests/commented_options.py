"""Options that a config shows as commented-out lines."""

from __future__ import annotations

import re

COMMENTED_OUT = re.compile(r"^( *)# (?=[a-z_]+: \S)", re.MULTILINE)


def uncommented(text: str) -> str:
    """A config with its commented-out options: the lines ``# key: value``, with one space after the ``#``."""
    return COMMENTED_OUT.sub(r"\1", text)
