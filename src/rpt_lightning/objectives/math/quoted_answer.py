"""Detect answers that only repeat an expression of the question.

Math-Verify compares values, so the question "What is 29 - 14?" could be answered by "29 - 14".

An expression counts as repeated if something is left to work out in it. A number, a fraction in lowest terms,
an interval of them or ``x = -2`` is worked out, even if the question contains it ("which of these?"). The
same holds for the true answer in another notation.
"""

from __future__ import annotations

import math
import re

from rpt_lightning.types import Question

_MACRO = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mathsf|boldsymbol|mbox)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(r"\s|\$|\\[,;:! ]|\{,\}|\\(?:left|right|displaystyle)(?![A-Za-z])|\^?\{?\\circ\}?|°")
# One character for each relation, sign or symbol that has several spellings.
_SPELLINGS: list[tuple[str, str]] = [
    *(
        (rf"\\(?:{names})(?![A-Za-z])", one)
        for names, one in {"cdot|times": "*", "div": "÷", "leq?": "≤", "geq?": "≥", "neq?": "≠"}.items()
    ),
    *(
        (rf"\\{name}(?![A-Za-z])", one)
        for name, one in {
            "lt": "<",
            "gt": ">",
            "in": "∈",
            "cup": "∪",
            "cap": "∩",
            "pi": "π",
            "infty": "∞",
        }.items()
    ),
    *(
        (rf"\\{name}(?![A-Za-z])", one)
        for name, one in {
            "emptyset": "∅",
            "varnothing": "∅",
            "approx": "≈",
            "lbrace": "⦃",
            "rbrace": "⦄",
        }.items()
    ),
    (r"\\\{", "⦃"),
    (r"\\\}", "⦄"),
    (r"\\%", "%"),
    (r"\*\*", "^"),
    ("[·×⋅]", "*"),
    ("[−–]", "-"),
    ("<=", "≤"),
    (">=", "≥"),
    (r"√(\d+)", r"\\sqrt{\1}"),
]
_FRACTION = re.compile(r"\\[dt]?frac(?:\{([^{}]*)\}|(\d))(?:\{([^{}]*)\}|(\d))")
_SHORT_GROUP = re.compile(r"(\^|\\sqrt|_)\{(-?\w+)\}")
_NAME = re.compile(r"^[A-Za-z](?:_\w)?(?:\([A-Za-z]\))?=")
_BETWEEN = re.compile(r"[=<>≤≥≠≈∈∪∩,;()\[\]⦃⦄]")
_PRODUCT = re.compile(r"[0-9A-Za-zπ!}]\(|\)[0-9A-Za-zπ(^!\\]")
_NUMBER = re.compile(r"[-+]?\d*\.?\d*%?")
_SYMBOL = re.compile(
    r"[-+]?\d*\.?\d*(?:[A-Za-zπ∞∅]|"
    r"\\(?!sqrt|frac|binom|sum|int|prod|log|ln|exp|sin|cos|tan|lim|gcd|max|min)[A-Za-z]+)+"
)
_PARTS = re.compile(r"[-+]?(?:\d+&)?(?P<above>\d*)(?P<root>\\sqrt\d+)?π?/(?P<below>\d+)")
_ROOT = re.compile(r"[-+]?\d*\\sqrt(?P<root>\d+)")


def quotes_question(prediction: str, question: Question) -> bool:
    r"""Whether the answer only repeats an expression of the question.

    That is so if it is in the question, leaves something to work out, and is not the true answer as written.

    >>> text = "What is 29 - 14? For which x, x = -2 or x = 15?"
    >>> difference = Question(question_id="q", text=text, answer="15")
    >>> [quotes_question(text, difference) for text in ("29-14", "$29 - 14$", "15", "29", "30 - 15", "x=-2")]
    [True, True, False, False, False, False]
    """
    text = plain(prediction)
    return (
        _NAME.sub("", text) != _NAME.sub("", plain(question.answer))
        and _leaves_work(text)
        and text in plain(question.text)
    )


def plain(text: str) -> str:
    r"""Normalise an expression: remove layout, fonts and degree signs, and unify notations.

    >>> texts = (r"$\dfrac{1}{2}$", "1 / 2", r"2 \times x^{2}", r"3\tfrac{1}{2}", r"\frac{x+1}{2}")
    >>> [plain(text) for text in texts]
    ['1/2', '1/2', '2*x^2', '3&1/2', '(x+1)/2']
    """
    text = without_fonts(text)
    for pattern, one in _SPELLINGS:  # before blanks are removed: a blank may end a command
        text = re.sub(pattern, one, text)
    text = _LAYOUT.sub("", text)
    text = _SHORT_GROUP.sub(r"\1\2", text)
    while (replaced := _FRACTION.sub(_in_a_line, text)) != text:
        text = replaced
    return text


def without_fonts(text: str) -> str:
    r"""Remove ``\text{...}`` and the like around letters."""
    while (bare := _MACRO.sub(r"\1", text)) != text:
        text = bare
    return text


def _in_a_line(match: re.Match[str]) -> str:
    above, below = (
        first if first is not None else second for first, second in (match.group(1, 2), match.group(3, 4))
    )
    before, behind = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    if before.isdigit() and (above + below).isdigit():
        return f"&{above}/{below}"  # three and a half
    fraction = "/".join(
        part if re.fullmatch(r"-?[\w.]+|\\sqrt\d+|-?\d*π", part) else f"({part})" for part in (above, below)
    )
    return f"({fraction})" if re.match(r"[\w)}!π]", before) or re.match(r"[\w(^\\π]", behind) else fraction


def _leaves_work(text: str) -> bool:
    """Whether something is left to work out.

    That is so if a part between relations, commas and brackets is more than a number or a name, or if parts
    are multiplied.
    """
    return _PRODUCT.search(text) is not None or not all(
        map(_is_worked_out, filter(None, _BETWEEN.split(text)))
    )


def _is_worked_out(part: str) -> bool:
    if _NUMBER.fullmatch(part) or _SYMBOL.fullmatch(part):
        return True
    if match := _ROOT.fullmatch(part):
        return _is_square_free(int(match["root"]))
    match = _PARTS.fullmatch(part)
    if match is None or (match["root"] and not _is_square_free(int(match["root"][5:]))):
        return False
    return int(match["below"]) > 1 and math.gcd(int(match["above"] or 1), int(match["below"])) == 1


def _is_square_free(number: int) -> bool:
    return (
        number > 1
        and number < 10**9
        and all(number % (factor * factor) for factor in range(2, math.isqrt(number) + 1))
    )
