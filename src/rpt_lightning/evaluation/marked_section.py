"""A part of a document that a command makes, between two lines that mark it."""

from __future__ import annotations


def replace_section(text: str, section: str, *, begin: str, end: str, where: str) -> str:
    """``text`` with ``section``, which ends with a line break, between the markers.

    Raises:
        ValueError: The markers are not there once each, in order; the message begins with ``where``.
    """
    head, found_begin, rest = text.partition(begin)
    old, found_end, tail = rest.partition(end)
    if not found_begin or not found_end or begin in tail or end in tail or begin in old:
        raise ValueError(
            f"{where}: needs the line {begin} and behind it the line {end}, once each; it lacks the lines, or has more of them"
        )
    return f"{head}{begin}\n{section}{end}{tail}"
