r"""The prediction in a completion: the content of ``\boxed{...}`` after the thought, as bytes.

This deviates from LaTeX on purpose. Braces are counted as bytes, and a backslash before a brace changes
nothing. ``\boxed{\{}`` is therefore not complete. The paper asks for the full content of the box with nested
braces and says nothing about escapes. A rule that depends on escapes would make ``\\{`` (a line break, then a
group) ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BOX_OPEN = b"\\boxed{"
BOX_CLOSE = b"}"
THINK_CLOSE = b"</think>"

_BRACES = re.compile(rb"\\boxed\{|[{}]")


def extract_prediction(text: bytes, *, think_close: bytes | None = THINK_CLOSE) -> bytes | None:
    r"""Return the content of the last complete ``\boxed{...}`` after the last ``think_close``.

    Returns None if there is none. The last box is the one that begins last, so the inner one of two nested
    boxes counts. A box is complete if its own brace is closed, counting braces in bytes. Nothing is stripped.
    Without the marker the thought never ended, and there is no prediction. ``think_close=None`` takes the
    whole text. The time is linear in the length of the text. Source: RPT, section 3.2.

    >>> extract_prediction(b"it is 2 + 2</think>So \\boxed{ 4}.")
    b' 4'
    """
    start = 0
    if think_close is not None:
        close_at = text.rfind(think_close)
        if close_at < 0:
            return None
        start = close_at + len(think_close)
    # For each open brace: the start of its box's content, or -1 for a plain brace.
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
    r"""Return the content of a box from a text that starts inside it: everything before its closing brace.

    Returns None if no brace closes the box.

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
    r"""Read a completion token by token and find the token that completes its first box.

    That is the first token after which `extract_prediction` finds a prediction in the text so far.

    >>> box = FirstBox(b"</think>")
    >>> [box.completed_by(token) for token in (b"so \\boxed{4}", b"</think>", b"\\boxed{", b"{", b"}", b"}.")]
    [False, False, False, False, False, True]
    """

    def __init__(self, think_close: bytes | None) -> None:
        self._think_close = think_close
        self._text = bytearray()

    def completed_by(self, token: bytes) -> bool:
        """Read the next token. Returns whether it completes the first box."""
        self._text += token
        # Only a brace can complete a box. Thoughts are long, so they are not searched again for every token.
        return (
            BOX_CLOSE in token
            and extract_prediction(bytes(self._text), think_close=self._think_close) is not None
        )


def answerable_lengths(
    continuation: Sequence[bytes], *, think_close: bytes | None = THINK_CLOSE
) -> tuple[int, ...]:
    r"""Return the token counts ``l`` whose joined bytes survive the box.

    This means that ``joined`` is not empty and that ``extract_prediction(think_close + b"\boxed{" + joined +
    b"}") == joined``. The braces of the first ``l`` tokens therefore balance, and they contain neither
    ``\boxed{`` nor ``think_close`` (None: thoughts have no marker).

    >>> answerable_lengths([b"{", b"x", b"}", b"}"])
    (3,)
    >>> answerable_lengths([b"[/T]", b"x"]), answerable_lengths([b"[/T]", b"x"], think_close=b"[/T]")
    ((1, 2), ())
    """
    joined = b"".join(continuation)
    # Prefixes of this length or more can never be answers.
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
