from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rpt_lightning.objectives.thought import AfterThought, num_until_early_end, thought_span
from rpt_lightning.types import Completion, SamplingSettings

SAMPLING = SamplingSettings(temperature=1.0, max_tokens=9, stop_token_ids=(7,), think_close=b"</t>")
TOKENS = st.lists(st.sampled_from([b"<", b"/t", b">", b"</t>", b"a", b"t>", b"</", b"> a", b""]), max_size=9)


def span_of(*tokens: bytes) -> tuple[int, int] | None:
    completion = Completion(
        token_ids=tuple(range(len(tokens))),
        text_bytes=b"".join(tokens),
        rollout_logprobs=(-1.0,) * len(tokens),
        policy_version=0,
        finish_reason="stop",
    )
    return thought_span(completion, b"</t>", lambda token_id: tokens[token_id])


@pytest.mark.parametrize(
    ("tokens", "span"),
    [
        ((b"so", b"</t>", b" 4"), (1, 2)),
        ((b"so", b"a<", b"/t", b"> 4", b"."), (1, 4)),  # the tokens that overlap the marker
        ((b"</t>",), (0, 1)),
        ((b"a", b"</t>", b"b", b"</t>"), (3, 4)),  # the last one
        ((b"so", b"</t"), None),
        ((), None),
    ],
)
def test_span_by_hand(tokens, span) -> None:
    assert span_of(*tokens) == span


@pytest.mark.parametrize(("num", "kept"), [(0, 3), (1, 4), (2, 5), (3, None)])
def test_end_by_hand(num, kept) -> None:
    tokens = [b"so<", b"/", b"t>", b" 4", b"."]
    assert num_until_early_end(tokens, replace(SAMPLING, tokens_after_thought=num)) == kept


def test_without_it_only_a_box_ends_a_completion() -> None:
    tokens = [b"</t>", b"\\boxed{", b"}", b"."]
    assert num_until_early_end(tokens, SAMPLING) is None
    assert num_until_early_end(tokens, replace(SAMPLING, stop_after_first_box=True)) == 3


@given(TOKENS, st.integers(0, 3))
@example([b"</", b"t>", b"a"], 1)
def test_the_marker_is_found_as_soon_as_the_text_holds_it(tokens: list[bytes], num: int) -> None:
    end = AfterThought(b"</t>", num)
    found = [place for place, token in enumerate(tokens, start=1) if end.completed_by(token)]
    holding = [place for place in range(1, len(tokens) + 1) if b"</t>" in b"".join(tokens[:place])]
    assert found == [place for place in holding[:1] if place + num <= len(tokens) for place in [place + num]]
