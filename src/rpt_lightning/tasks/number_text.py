"""Numbers as programs write them, in digits."""

from __future__ import annotations

import re
from decimal import Decimal

_EXPONENT = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)[eE][+-]?\d{1,3}")


def plain_number(text: str) -> str:
    """A number with an exponent (``1e-05``) in digits; any other text as it is.

    Math-Verify reads the ``e`` as Euler's number, so that ``1e-05`` would equal ``e - 5`` and not ``0.00001``.

    >>> [plain_number(text) for text in ("1e-05", "-2.5E+3", "e-5", "2e", "1.50")]
    ['0.00001', '-2500', 'e-5', '2e', '1.50']
    """
    return format(Decimal(text.strip()), "f") if _EXPONENT.fullmatch(text.strip()) else text
