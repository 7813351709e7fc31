"""The splitter of sentences, by examples and properties."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.objectives.sentences import sentence_spans, sentences

# Pieces that rules look at, so that random texts are hard ones.
PIECES = [
    "A",
    "b",
    "7",
    " ",
    "\n",
    "\n\n",
    ".",
    "!",
    "?",
    "…",
    '"',
    ")",
    "(",
    "Mr",
    "e.g",
    "Fig",
    "。",
    "é",
    "\u3000",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


def split(text: str) -> list[str]:
    return [text[start:end] for start, end in sentence_spans(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?"]),  # the last one is not finished
        ("It cost 3.5 pounds. Really.", ["It cost 3.5 pounds.", "Really."]),
        ("Mr. Brown met Dr. J. R. Smith. They spoke.", ["Mr. Brown met Dr. J. R. Smith.", "They spoke."]),
        ("See Fig. 3. No. 4 is lost. Say no. We go.", ["See Fig. 3.", "No. 4 is lost.", "Say no.", "We go."]),
        ("Use tools, e.g. Vim. Then i.e. save.", ["Use tools, e.g. Vim.", "Then i.e. save."]),
        ('He asked "Why?" and left. "Go!" she said.', ['He asked "Why?" and left.', '"Go!" she said.']),
        ("(It rained.) We stayed.", ["(It rained.)", "We stayed."]),
        ("Wait... what? Yes... No.", ["Wait... what?", "Yes...", "No."]),
        ("1. First thing. 2. Second thing.", ["1. First thing.", "2. Second thing."]),
        ("So did I. He left.", ["So did I.", "He left."]),
        ("Wrapped\nlines go on.\nNext one.", ["Wrapped\nlines go on.", "Next one."]),
        ("A heading\n\nA sentence.\n\n>>> code\n\nMore.", ["A sentence.", "More."]),
        ("你好。我是人！", ["你好。", "我是人！"]),
        ("The ball is under cup 6. 5 turn 6 flip. The ball is under cup 3.",
         ["The ball is under cup 6.", "5 turn 6 flip.", "The ball is under cup 3."]),
        ("Visit example.com now. Or not.", ["Visit example.com now.", "Or not."]),
        ("... !? .", []),
        ("", []),
    ],
)  # fmt: skip
def test_examples(text: str, found: list[str]) -> None:
    assert split(text) == found


@given(TEXTS)
def test_spans_lie_in_order_and_hold_whole_sentences(text: str) -> None:
    spans = sentence_spans(text)
    places = [place for span in spans for place in span]
    assert places == sorted(places)
    for start, end in spans:
        piece = text[start:end]
        assert piece == piece.strip()
        assert any(character.isalnum() for character in piece)
        assert "\n\n" not in piece
        assert piece.rstrip("\"')]}』」）")[-1] in ".!?…。！？"


@given(TEXTS, st.data())
def test_where_a_sentence_begins_does_not_depend_on_tokens(text: str, data: st.DataObject) -> None:
    """However a text is cut into tokens, what is found are its sentences, each beginning at its token."""
    raw = text.encode()
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=60).map(sorted))
    edges = [0, *cuts, len(raw)]
    tokens = [raw[start:end] for start, end in itertools.pairwise(edges)]
    found = sentences(tokens)
    assert all(one.text.strip() in split(text) for one in found)
    for one in found:
        before, after = b"".join(tokens[: one.position]), b"".join(tokens[one.position :])
        assert after.startswith(one.text.encode())
        assert one.is_last == (len(before + one.text.encode()) == len(raw))
    # With a token for each byte, none is missed.
    whole = sentences([bytes([byte]) for byte in raw])
    assert [one.text for one in whole] == split(text)
    positions = [one.position for one in whole]
    assert positions == sorted(set(positions))
    assert [one.position for one in found] == sorted({one.position for one in found})


def test_a_token_across_the_beginning_leaves_a_sentence_out() -> None:
    found = sentences([b"One", b" a", b". Tw", b"o b", b".", b" ", b" Three", b" c", b"."])
    assert [(one.position, one.text) for one in found] == [(0, "One a."), (6, " Three c.")]
    assert [one.is_joined for one in found] == [False, False]  # what is left out lies between


def test_joined() -> None:
    found = sentences([b"One.", b"\n", b"Two.", b"\n\nTitle\n\n", b"Three."])
    assert [one.is_joined for one in found] == [False, True, False]


def test_bytes_that_are_not_text() -> None:
    found = sentences([b"One.", b" \xff", b" two.", b" Three."])
    assert [one.text for one in found] == ["One.", " Three."]
    assert sentences([b"One.", b" Caf", b"\xc3"])[0].text == "One."  # cut inside a character
