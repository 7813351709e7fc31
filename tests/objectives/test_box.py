from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rpt_lightning.objectives.box import FirstBox, answerable_lengths, extract_prediction

# Pieces that break boxes, including bytes that are not UTF-8 and pieces that split a character.
PIECES = [
    b"\\boxed{",
    b"\\boxed",
    b"{",
    b"}",
    b"\\{",
    b"\\text{a}",
    b"</think>",
    b"</thi",
    b"nk>",
    b"[/T]",
    b"[/",
    b"T]",
    b" ",
    b"\n",
    b"4",
    b"\xf0\x9f",
    b"\x98\x80",
    b"\xff",
    b"",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map(b"".join)


def by_definition(text: bytes, think_close: bytes | None) -> bytes | None:
    """The rule of design.md, applied literally and without regard to speed."""
    if think_close is not None:
        if think_close not in text:
            return None
        text = text.split(think_close)[-1]
    opener = b"\\boxed{"
    for start in reversed(range(len(text))):
        if text.startswith(opener, start):
            depth = 1
            for end in range(start + len(opener), len(text)):
                depth += {b"{": 1, b"}": -1}.get(text[end : end + 1], 0)
                if depth == 0:
                    return text[start + len(opener) : end]
    return None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"hm</think>\\boxed{ 4}", b" 4"),
        (b"</think>\\boxed{\\frac{1}{2}} done", b"\\frac{1}{2}"),
        (b"</think>\\boxed{\\text{ and}}", b"\\text{ and}"),
        (b"</think>\\boxed{{}}", b"{}"),
        (b"</think>\\boxed{{}", None),
        (b"</think>\\boxed{}", b""),
        (b"</think>\\boxed{}}", b""),
        (b"</think>\\boxed{\n\n }", b"\n\n "),
        (b"</think>first \\boxed{a}, no: \\boxed{b}.", b"b"),
        (b"</think>\\boxed{a} and \\boxed{b", b"a"),
        (b"</think>\\boxed{b \\boxed{a}", b"a"),
        (b"</think>\\boxed{a\\boxed{b}c}", b"b"),
        (b"</think>}}\\boxed{a}", b"a"),
        (b"</think>{\\boxed{a}", b"a"),
        (b"</think>\\boxed{\\{}", None),
        (b"</think>\\boxed{\\}}", b"\\"),
        (b"</think>\\boxed {a}", None),
        (b"\\boxed{in the thought}</think>nothing", None),
        (b"\\boxed{in the thought}</think>\\boxed{a}", b"a"),
        (b"\\boxed{the thought never ended}", None),
        (b"a</think>\\boxed{a}</think>\\boxed{b}", b"b"),
        (b"a</think>\\boxed{a}</think>", None),
        (b"</think>\\boxed{a</think>b}", None),
        (b"</think>\\boxed{\xf0\x9f}", b"\xf0\x9f"),
        (b"", None),
    ],
)
def test_examples(text: bytes, expected: bytes | None) -> None:
    assert extract_prediction(text) == expected == by_definition(text, b"</think>")


def test_other_markers() -> None:
    assert extract_prediction(b"\\boxed{a}[/T]\\boxed{b}", think_close=b"[/T]") == b"b"
    assert extract_prediction(b"\\boxed{a}</think>", think_close=None) == b"a"


@given(TEXTS, st.sampled_from([b"</think>", None]))
@example(b"</think>\\boxed{" * 3 + b"}" * 2, b"</think>")
def test_the_definition(text: bytes, think_close: bytes | None) -> None:
    assert extract_prediction(text, think_close=think_close) == by_definition(text, think_close)


@given(st.binary(max_size=30), st.binary(max_size=30))
def test_balanced_content_comes_back_untouched(thought: bytes, content: bytes) -> None:
    content = content.replace(b"{", b"").replace(b"}", b"").replace(b"</think>", b"")
    assert extract_prediction(thought + b"</think>\\boxed{" + content + b"}") == content


@pytest.mark.parametrize(
    "unit", [b"\\boxed{", b"{", b"}", b"\\boxed{}", b"\\boxe", b"\\boxed{{", b"</think>", b"x"]
)
def test_a_megabyte_takes_linear_time(unit: bytes) -> None:
    text = b"</think>" + unit * (1_000_000 // len(unit)) + b"\\boxed{a}"
    start = time.process_time()
    assert extract_prediction(text) == b"a"
    assert time.process_time() - start < 5.0  # quadratic time would take hours


@given(st.lists(st.sampled_from(PIECES), max_size=10), st.sampled_from([b"</think>", b"[/T]", None]))
@example([b"{", b"x", b"}", b"}", b"y"], b"</think>")
@example([b"a", b"</thi", b"nk>", b"b"], b"</think>")
@example([b"a", b"</thi", b"nk>", b"b"], None)
@example([b"a", b"[/", b"T]", b"b"], b"[/T]")
@example([b"\\box", b"ed{", b"}", b"b"], b"</think>")
@example([b"", b"", b"a", b""], b"</think>")
def test_answerable_lengths_are_what_survives_the_box(
    continuation: list[bytes], think_close: bytes | None
) -> None:
    prefixes = [b"".join(continuation[:length]) for length in range(1, len(continuation) + 1)]
    texts = [(think_close or b"") + b"\\boxed{" + joined + b"}" for joined in prefixes]
    predictions = [extract_prediction(text, think_close=think_close) for text in texts]
    survivors = [n for n, joined in enumerate(prefixes, 1) if joined and predictions[n - 1] == joined]
    assert answerable_lengths(continuation, think_close=think_close) == tuple(survivors)


def test_answerable_lengths_by_hand() -> None:
    assert answerable_lengths([b"a", b"{", b"b", b"}", b"}", b"c"]) == (1, 4)
    assert answerable_lengths([b"}", b"a"]) == ()
    assert answerable_lengths([]) == ()
    assert answerable_lengths([b"\xf0\x9f", b"\x98\x80"]) == (1, 2)


def test_answerable_lengths_of_a_long_document_take_linear_time() -> None:
    start = time.process_time()
    assert len(answerable_lengths([b"ab "] * 300_000)) == 300_000
    assert time.process_time() - start < 5.0


@given(st.lists(st.sampled_from(PIECES), max_size=14), st.sampled_from([b"</think>", None]))
# A box inside a box is complete first, and it is the one that counts.
@example([b"</think>", b"\\boxed{", b"\\boxed{", b"4", b"}"], b"</think>")
# The token that closes the box also closes the thought once more.
@example([b"</think>", b"\\boxed{4}</think>", b"\\boxed{5", b"}"], b"</think>")
def test_the_first_box_is_complete_when_the_text_so_far_has_a_prediction(
    tokens: list[bytes], think_close: bytes | None
) -> None:
    box = FirstBox(think_close)
    for end, token in enumerate(tokens, start=1):
        found = box.completed_by(token)
        assert found == (by_definition(b"".join(tokens[:end]), think_close) is not None)
        if found:
            break
