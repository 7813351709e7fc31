"""``~`` in every path that a command is given: a shell replaces it in ``--flag ~/x`` only, neither in ``--flag=~/x`` nor in YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def with_home(value: Any) -> Any:
    """A parsed configuration in which every text or path that begins with ``~/`` begins with the home folder. Namespaces are changed in place.

    >>> with_home({"path": "~/x", "parts": ["~/y", "a~/b", 3]}) == {"path": os.path.expanduser("~/x"), "parts": [os.path.expanduser("~/y"), "a~/b", 3]}
    True
    """
    if isinstance(value, (str, Path)):
        text = str(value)
        return type(value)(os.path.expanduser(text)) if text == "~" or text.startswith("~/") else value
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(with_home(part) for part in value)
    if isinstance(value, dict):
        return {key: with_home(part) for key, part in value.items()}
    if type(value).__name__ == "Namespace":  # jsonargparse's, which is imported by commands that need it
        for key, part in vars(value).items():
            setattr(value, key, with_home(part))
    return value
