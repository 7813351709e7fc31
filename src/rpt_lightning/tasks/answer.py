r"""The prediction inside a completion: the content of ``\boxed{...}`` after the thought, as bytes.

Deviation from LaTeX, on purpose: braces are counted as bytes, and a backslash before a brace changes nothing. ``\boxed{\{}`` is therefore not
complete; the paper asks for the full content of the box with nested braces and says nothing about escapes, and a rule that depends on escapes would
make ``\\{`` (a line break, then a group) ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BOX_OPEN = b"\\boxed{"
BOX_CLOSE = b"}"
THINK_CLOSE = b"</think>"

_BRACES = re.compile(rb"\\boxed\{|[{}]")


def extract_prediction(text: bytes, *, think_close: bytes | None = THINK_CLOSE) -> bytes | None:
    r"""Content of the complete ``\boxed{...}`` that begins last, after the last ``think_close``; None where there is none.

    Complete means that the box's own brace is closed, counting braces in bytes. Nothing is stripped. A box inside a box begins later, so the inner
    one counts. Where the marker is missing the thought never ended, and there is no prediction; ``think_close=None`` takes the whole text. Linear in
    the length of the text. Source: RPT, section 3.2.

    >>> extract_prediction(b"it is 2 + 2</think>So \\boxed{ 4}.")
    b' 4'
    """
    start = 0
    if think_close is not None:
        close_at = text.rfind(think_close)
        if close_at < 0:
            return None
        start = close_at + len(think_close)
    # For each brace that is open: where the content of its box starts, or -1 for a plain brace.
    open_braces: list[int] = []
    found: tuple[int, int] | None = None
    for match in _BRACES.finditer(text, start):
        brace = match.group()
        if brace == b"{":
            open_braces.append(-1)
        elif brace != b"}":
            open_braces.append(match.end())
        elif open_braces:
            content_start = open_braces.pop()
            if content_start >= 0 and (found is None or content_start > found[0]):
                found = content_start, match.start()
    return None if found is None else text[found[0] : found[1]]


def open_box_content(text: bytes) -> bytes | None:
    r"""Of a text that goes on inside a box: what stands before the brace that closes it; None where none does.

    >>> open_box_content(b"x_{1}} and more}")
    b'x_{1}'
    """
    depth = 1
    for match in _BRACES.finditer(text):
        depth += -1 if match.group() == BOX_CLOSE else 1
        if depth == 0:
            return text[: match.start()]
    return None


class FirstBox:
    r"""Reads a completion token by token and says which token completes its first box.

    That is the first token after which `extract_prediction` finds a prediction in what was read so far.

    >>> box = FirstBox(b"</think>")
    >>> [box.completed_by(token) for token in (b"so \\boxed{4}", b"</think>", b"\\boxed{", b"{", b"}", b"}.")]
    [False, False, False, False, False, True]
    """

    def __init__(self, think_close: bytes | None) -> None:
        self._think_close = think_close
        self._text = bytearray()

    def completed_by(self, token: bytes) -> bool:
        """Reads the next token."""
        self._text += token
        # Only a brace can complete a box: thoughts are long, and are not searched again for every token.
        return (
            BOX_CLOSE in token
            and extract_prediction(bytes(self._text), think_close=self._think_close) is not None
        )


def answerable_lengths(
    continuation: Sequence[bytes], *, think_close: bytes | None = THINK_CLOSE
) -> tuple[int, ...]:
    r"""Token counts ``l`` whose joined bytes survive the box: ``extract_prediction(think_close + b"\boxed{" + joined + b"}") == joined``, joined non-empty.

    So the braces of the first ``l`` tokens balance, and neither ``\boxed{`` nor ``think_close`` is inside (None: thoughts have no marker).

    >>> answerable_lengths([b"{", b"x", b"}", b"}"])
    (3,)
    >>> answerable_lengths([b"[/T]", b"x"]), answerable_lengths([b"[/T]", b"x"], think_close=b"[/T]")
    ((1, 2), ())
    """
    joined = b"".join(continuation)
    # Prefixes from this length on can never be answered.
    limit = len(joined) + 1
    for marker in (BOX_OPEN,) if think_close is None else (BOX_OPEN, think_close):
        marker_at = joined.find(marker)
        if marker_at >= 0:
            limit = min(limit, marker_at + len(marker))
    lengths: list[int] = []
    length = depth = 0
    for num_tokens, token in enumerate(continuation, start=1):
        for match in _BRACES.finditer(token):
            depth += 1 if match.group() != b"}" else -1
            if depth < 0:
                return tuple(lengths)
        length += len(token)
        if length >= limit:
            break
        if depth == 0 and length > 0:
            lengths.append(num_tokens)
    return tuple(lengths)
