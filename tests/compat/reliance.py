"""Checks of an installed library, with messages that say what changed and what of ours relies on it."""

from __future__ import annotations

import inspect
from typing import Any


def check_has(owner: Any, *names: str, used_by: Any) -> None:
    lacking = [name for name in names if not hasattr(owner, name)]
    assert not lacking, f"{_name(owner)} no longer has {', '.join(lacking)}, which {_name(used_by)} uses"


def check_takes(function: Any, *parameters: str, used_by: Any) -> None:
    taken = inspect.signature(function).parameters
    lacking = [name for name in parameters if name not in taken]
    assert not lacking, (
        f"{_name(function)} no longer takes {', '.join(lacking)}, which {_name(used_by)} passes: it takes "
        f"{', '.join(taken)}"
    )


def check_source(owner: Any, *texts: str, used_by: Any) -> None:
    """Look for texts in a library's source, if nothing that can be called would show a change."""
    source = inspect.getsource(owner)
    lacking = [text for text in texts if text not in source]
    assert not lacking, (
        f"the source of {_name(owner)} no longer contains {lacking}: read it again, since {_name(used_by)} "
        "relies on what stood there"
    )


def _name(thing: Any) -> str:
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    return f"{module}.{name}" if module and name else str(getattr(thing, "__name__", thing))
