"""Where the thought of a completion ends, and completions that end soon after it.

The search is in bytes, because the policy may write the closing marker with other tokens than the template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rpt_lightning.objectives.box import FirstBox
from rpt_lightning.types import Completion, SamplingSettings


def thought_span(
    completion: Completion, marker: bytes, bytes_of: Callable[[int], bytes]
) -> tuple[int, int] | None:
    """Return the number of tokens before the last ``marker``, and of those up to its end.

    The first number leaves out a token that overlaps the marker. The second counts it. The result is None if
    the completion does not contain the marker. ``bytes_of`` returns the bytes of a token.
    """
    start = completion.text_bytes.rfind(marker)
    if start < 0:
        return None
    before = length = 0
    for number, token_id in enumerate(completion.token_ids, start=1):
        length += len(bytes_of(token_id))
        if length <= start:
            before = number
        if length >= start + len(marker):
            return before, number
    raise AssertionError("a completion's text is that of its tokens")


class AfterThought:
    """Read a completion token by token and find the ``num_tokens``-th token after its thought.

    The thought ends with the token that completes ``think_close``. With 0 this is the token that is found.

    >>> end = AfterThought(b"</think>", 1)
    >>> [end.completed_by(token) for token in (b"so</", b"think", b">", b" 4", b".")]
    [False, False, False, True, False]
    """

    def __init__(self, think_close: bytes, num_tokens: int) -> None:
        self._think_close = think_close
        self._num_left = num_tokens
        self._tail = b""  # of the text, as far as it may begin the marker
        self._is_after = False

    def completed_by(self, token: bytes) -> bool:
        """Read the next token. Returns whether the completion ends with it."""
        if self._is_after:
            self._num_left -= 1
        else:
            text = self._tail + token
            self._is_after = self._think_close in text
            self._tail = text[max(0, len(text) - len(self._think_close) + 1) :]
        return self._is_after and self._num_left == 0


def early_end(sampling: SamplingSettings) -> FirstBox | AfterThought | None:
    """Return what finds the last token of a completion. None: only stop tokens and the limit end it."""
    if sampling.tokens_after_thought is not None:
        assert sampling.think_close is not None
        return AfterThought(sampling.think_close, sampling.tokens_after_thought)
    return FirstBox(sampling.think_close) if sampling.stop_after_first_box else None


def num_until_early_end(tokens: Sequence[bytes], sampling: SamplingSettings) -> int | None:
    """Return how many of a completion's tokens are kept. None: it does not end early."""
    end = early_end(sampling)
    if end is None:
        return None
    return next((number for number, token in enumerate(tokens, start=1) if end.completed_by(token)), None)
