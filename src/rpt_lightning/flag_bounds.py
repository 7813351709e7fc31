"""Bounds on the values of flags."""

from __future__ import annotations


def check_number(
    flag: str,
    value: float | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> None:
    """Raise ValueError that names the flag if its number is out of bounds or NaN.

    NaN passes every comparison, so it is tested for. None is always accepted: the flag gives it a meaning.

    >>> check_number("rollout.sampling.top_p", 1.5, above=0, most=1)
    Traceback (most recent call last):
    ValueError: rollout.sampling.top_p=1.5: give a number above 0 and of at most 1
    """
    if value is None:
        return
    is_within = [
        value == value,
        least is None or value >= least,
        above is None or value > above,
        most is None or value <= most,
        below is None or value < below,
    ]
    if not all(is_within):
        bounds = [("of at least", least), ("above", above), ("of at most", most), ("below", below)]
        words = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        raise ValueError(f"{flag}={value}: give a number {words}{hint}")
