from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.metrics.token_kind import TOKEN_KINDS, token_kind

KINDS = {
    "word": [b"the", b" the", b"\nThe", "é".encode(), " ∑x".encode(), "数".encode(), b"x_1", b"1st"],
    "number": [b"4", b" 42", b"4)", b"3.", "²".encode(), "٣".encode()],
    "symbol": [b"}", b" \\", b"_", b"<|", "∑".encode(), b"\xe2\x88", b" \xc3", b"$\n"],
    "space": [b" ", b"\n\n", b"\t ", "\u00a0".encode(), b""],
}


@pytest.mark.parametrize(
    ("kind", "token"), [(kind, token) for kind, tokens in KINDS.items() for token in tokens]
)
def test_by_hand(kind, token):
    assert token_kind(token) == kind


@given(st.binary(max_size=8), st.sampled_from([b" ", b"\n", b"\t"]))
def test_space_around_a_token_changes_nothing(token, space):
    kind = token_kind(token)
    assert kind in TOKEN_KINDS
    assert token_kind(space + token) == kind
    assert token_kind(token + space) == kind
