"""The kind of a token: word, number, symbol or space."""

from __future__ import annotations

from typing import Literal, get_args

TokenKind = Literal["word", "number", "symbol", "space"]
TOKEN_KINDS: tuple[TokenKind, ...] = get_args(TokenKind)


def token_kind(token: bytes) -> TokenKind:
    """Return the kind of a token.

    A token with a letter is a word. Otherwise a token with a digit is a number. Otherwise a token with any
    character that is not white space is a symbol. All other tokens are space.

    Characters come from the token's bytes as UTF-8. A token may end inside a character, and bytes that do
    not form a whole character count as symbols.

    >>> tokens = (b" the", b"x2", b" 4", b"4)", b" \\\\", "é".encode(), b"\\xc3", b"\\n  ")
    >>> [token_kind(token) for token in tokens]
    ['word', 'word', 'number', 'number', 'symbol', 'word', 'symbol', 'space']
    """
    text = token.decode(errors="replace")
    if any(character.isalpha() for character in text):
        return "word"
    if any(character.isnumeric() for character in text):
        return "number"
    return "space" if not text or text.isspace() else "symbol"
