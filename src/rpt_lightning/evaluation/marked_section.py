"""Replace a generated part of a document that stands between two marker lines."""

from __future__ import annotations


def replace_section(text: str, section: str, *, begin: str, end: str, where: str) -> str:
    """Return ``text`` with ``section``, which ends with a line break, between the markers.

    Raises:
        ValueError: The markers do not each occur once, in order. The message begins with ``where``.
    """
    head, found_begin, rest = text.partition(begin)
    old, found_end, tail = rest.partition(end)
    if not found_begin or not found_end or begin in tail or end in tail or begin in old:
        raise ValueError(
            f"{where}: needs the line {begin} and, after it, the line {end}, once each; a line is missing or "
            "occurs more than once"
        )
    return f"{head}{begin}\n{section}{end}{tail}"
