r"""Where the sentences of a text begin and end, by rules alone.

RLPT (arXiv:2509.19249) splits with NLTK, whose model is a download. These rules need none. They are written
for prose in European scripts, and they know the full stops of Chinese and Japanese:

- A blank line ends a sentence. A single line break does not, because texts are often wrapped.
- ``.``, ``!``, ``?`` or an ellipsis ends a sentence if white space or the end of the text follows, perhaps
  after closing quotes and brackets, and if what comes next does not begin with a small letter.
- A full stop after an abbreviation (`ABBREVIATIONS`), an initial ("J. Smith") or the number of a list item
  does not end a sentence. After `NUMBERED` ("Fig. 3") it does not if a digit follows.
- A full stop of Chinese or Japanese always ends a sentence.

So a sentence that ends in an abbreviation is joined with the next one. A piece that does not end in one of
these marks, such as a heading or a line of code, is no sentence. The time is linear in the length of a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never at the end of a sentence. Compared in small letters, without the last full stop.
ABBREVIATIONS = _words(
    """
    mr mrs ms dr prof rev hon st jr sr gen col lt capt sgt sen rep gov pres
    e.g i.e cf viz resp approx ca vs incl esp
    jan feb mar apr jun jul aug sep sept oct nov dec
    inc ltd corp co bros dept univ assn
    bzw z.b d.h u.a usw vgl bspw
    """
)
# Not at the end of a sentence before a number.
NUMBERED = _words("no nos fig figs eq eqs sec secs ch chap vol p pp art tab nr bd s pt pts ref refs")

_CLOSING = "\"'”’»)]}」』）"
_MARKS = ".!?…。！？"
# Each alternative begins at one place of a run and gives nothing back, so that the time stays linear.
_END = re.compile(
    r"(?P<blank>\n[^\S\n]*+\n)"
    r"|(?P<wide>[。！？]++[」』）]*+)"
    rf"|(?<![.!?…])(?P<mark>[.!?…]++)[{re.escape(_CLOSING)}]*+(?=\s|\Z)"
)
_SPACE = re.compile(r"\s*+")
_OPENING = re.compile(r"[\s\"'“‘«(\[{*_]*")
_LAST_WORD = re.compile(r"[^\s\"'“‘«(\[{]*\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """A sentence of a document.

    ``position`` is the index of its first token. ``text`` is what stands from there on to the sentence's end:
    white space that belongs to the first token, then the sentence. ``is_joined`` says that nothing but white
    space lies between it and the sentence before it, and ``is_last`` that the document ends with it.
    """

    position: int
    text: str
    is_joined: bool
    is_last: bool

    @property
    def words(self) -> list[str]:
        return self.text.split()

    @property
    def in_line(self) -> str:
        """The sentence in a single line, with single spaces and none around it."""
        return " ".join(self.words)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return the characters from and to (exclusive) which each sentence goes, without space around it.

    >>> text = "Dr. No came at 5 p.m. on Monday. Why? See Fig. 3."
    >>> [text[start:end] for start, end in sentence_spans(text)]
    ['Dr. No came at 5 p.m. on Monday.', 'Why?', 'See Fig. 3.']
    """
    spans, start = [], 0
    for match in _END.finditer(text):
        if match["mark"] is not None and not _ends(text, start, match):
            continue
        if (span := _stripped(text, start, match.end())) is not None:
            spans.append(span)
        start = match.end()
    if (span := _stripped(text, start, len(text))) is not None:
        spans.append(span)
    return spans


def sentences(tokens: Sequence[bytes]) -> list[Sentence]:
    r"""Return the sentences of a document that begin at a token, in order. ``tokens`` are its tokens' bytes.

    A sentence whose first token also holds the end of what comes before it is left out. So is one with bytes
    that are not text.

    >>> sentences([b"It", b" rains", b".", b"\n", b"We", b" wait", b"."])[1]
    Sentence(position=4, text='We wait.', is_joined=True, is_last=True)
    >>> sentences([b"It", b" rains", b".", b" We", b" wait", b"."])[1]
    Sentence(position=3, text=' We wait.', is_joined=True, is_last=True)
    """
    text = b"".join(tokens).decode(errors="surrogateescape")
    token_at, length = {}, 0  # token by the byte at which it begins; an empty token begins nothing
    for number, token in enumerate(tokens):
        if token:
            token_at[length] = number
        length += len(token)
    found, at, character, last = list[Sentence](), 0, 0, 0
    for start, end in sentence_spans(text):
        at += len(text[character:start].encode(errors="surrogateescape"))
        character = start
        first = _token_start(text, start, at, token_at)
        if first is not None and _is_text(text[first:end]):
            before = len(text[first:start].encode())
            found.append(
                Sentence(
                    position=token_at[at - before],
                    text=text[first:end],
                    is_joined=last > 0 and not text[last:start].strip(),
                    is_last=end == len(text),
                )
            )
            last = end
    return found


def _token_start(text: str, start: int, at: int, token_at: Mapping[int, int]) -> int | None:
    """Return the last character at which a token begins: that of the sentence, or of the space before it."""
    first, place = start, at
    while place not in token_at:
        if first == 0 or not text[first - 1].isspace():
            return None
        first -= 1
        place -= len(text[first].encode())
    return first


def _stripped(text: str, start: int, end: int) -> tuple[int, int] | None:
    """Return the span without space around it. None: it is no sentence."""
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    piece = piece.strip()
    is_sentence = piece.rstrip(_CLOSING)[-1:] in tuple(_MARKS) and any(map(str.isalnum, piece))
    return (start, start + len(piece)) if is_sentence else None


def _ends(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether a mark ends the sentence that began at ``start``."""
    opening = _OPENING.match(text, match.end())
    assert opening is not None
    following = text[opening.end() : opening.end() + 1]
    if following.islower():
        return False
    if match["mark"] != "." or not following:
        return True
    before = text[max(start, match.start() - 24) : match.start()]
    last = _LAST_WORD.search(before)
    assert last is not None
    word = last.group()
    space = _SPACE.match(text, start)
    assert space is not None
    is_first = space.end() == match.start() - len(word)
    return not (
        word.lower() in ABBREVIATIONS
        or (word.lower() in NUMBERED and following.isdigit())
        or (len(word) == 1 and word.isalpha() and word.isupper() and word != "I")
        or (is_first and word.isdigit())
    )


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
