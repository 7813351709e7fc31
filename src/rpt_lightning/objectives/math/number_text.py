"""Convert numbers as programs write them to digits."""

from __future__ import annotations

import re
from decimal import Decimal

ANY_EXPONENT = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)[eE][+-]?\d{1,3}")
# Only programs write numbers in this form. 2e-1 may be 2e - 1 with Euler's number, which has neither a
# capital E nor a zero before the 1.
_EXPONENT = re.compile(r"[+-]?(?:(?:\d+\.\d*|\.\d+)[eE][+-]?\d{1,3}|\d+E[+-]?\d{1,3}|\d+e[+-]?0\d{1,2})")


def plain_number(text: str) -> str:
    """Write a number with an exponent (``1e-05``) in digits. Any other text is returned unchanged.

    That includes ``2e-1``, which may hold Euler's number. Math-Verify always takes ``e`` for Euler's number,
    so that ``1e-05`` would equal ``e - 5`` and not ``0.00001``.
    >>> [plain_number(text) for text in ("1e-05", "-2.5e+3", "1E5", "2e-1", "e-5", "2e", "1.50")]
    ['0.00001', '-2500', '100000', '2e-1', 'e-5', '2e', '1.50']
    """
    return digits(text) if _EXPONENT.fullmatch(text.strip()) else text


def digits(number: str) -> str:
    """Write a number with an exponent in digits."""
    return format(Decimal(number.strip()), "f")
