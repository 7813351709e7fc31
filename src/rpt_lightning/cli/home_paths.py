"""Expands ``~`` in every path that a command gets.

A shell expands it only in ``--flag ~/x``, not in ``--flag=~/x`` and not in YAML.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rpt_lightning.compat.jsonargparse import is_namespace


def with_home(value: Any) -> Any:
    """Expand ``~/`` at the beginning of every text or path in a parsed configuration.

    Namespaces are changed in place.

    >>> home = os.path.expanduser("~")
    >>> with_home({"path": "~/x", "parts": ["~/y", "a~/b", 3]}) == {
    ...     "path": f"{home}/x", "parts": [f"{home}/y", "a~/b", 3]}
    True
    """
    if isinstance(value, (str, Path)):
        text = str(value)
        return type(value)(os.path.expanduser(text)) if text == "~" or text.startswith("~/") else value
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(with_home(part) for part in value)
    if isinstance(value, dict):
        return {key: with_home(part) for key, part in value.items()}
    if is_namespace(value):
        for key, part in vars(value).items():
            setattr(value, key, with_home(part))
    return value
