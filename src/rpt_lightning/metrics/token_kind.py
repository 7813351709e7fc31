"""What a token is: a word, a number, a symbol or space."""

from __future__ import annotations

from typing import Literal, get_args

TokenKind = Literal["word", "number", "symbol", "space"]
TOKEN_KINDS: tuple[TokenKind, ...] = get_args(TokenKind)


def token_kind(token: bytes) -> TokenKind:
    """The first of these that a token holds: a letter (word), a digit (number), anything else that is not white space (symbol); else it is space.

    Characters are those of the token's bytes as UTF-8. Bytes that are no whole character, since a token may end inside one, count as symbols.

    >>> [token_kind(token) for token in (b" the", b"x2", b" 4", b"4)", b" \\\\", "é".encode(), b"\\xc3", b"\\n  ")]
    ['word', 'word', 'number', 'number', 'symbol', 'word', 'symbol', 'space']
    """
    text = token.decode(errors="replace")
    if any(character.isalpha() for character in text):
        return "word"
    if any(character.isnumeric() for character in text):
        return "number"
    return "space" if not text or text.isspace() else "symbol"
