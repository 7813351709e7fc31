from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.rollout.prefix_cache import UnlimitedPrefixCache

PROMPTS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple), st.integers(1, 3)), max_size=12
)


def test_positions_of_a_document_counted_by_hand() -> None:
    cache = UnlimitedPrefixCache(block_size=4)
    document = tuple(range(100, 120))
    # 10 tokens, 3 completions: the first computes all, and the other two share the 2 whole blocks.
    assert cache.serve(document[:10], 3) == 0 + 2 * 8
    # 13 tokens: 2 blocks of the earlier position. The second completion also gets the new third block (12 of
    # 13 tokens).
    assert cache.serve(document[:13], 2) == 8 + 12
    # 12 tokens, all of them in known whole blocks: the last block is computed again for the last token's
    # logits.
    assert cache.serve(document[:12], 2) == 8 + 8
    # A suffix of the template follows the document and ends the common part in the middle of the fourth
    # block.
    assert cache.serve((*document[:14], 7, 7, 7), 1) == 12
    # Another document shares nothing, even if its second block equals one of the first document.
    assert cache.serve((1, 2, 3, 4, *document[4:10]), 1) == 0


def test_a_prompt_within_one_block_shares_nothing() -> None:
    cache = UnlimitedPrefixCache(block_size=4)
    assert cache.serve((1, 2, 3), 5) == cache.serve((1, 2, 3, 4), 5) == 0
    assert cache.serve((1, 2, 3, 4, 5), 5) == 20  # the previous prompt held its only whole block
    with pytest.raises(ValueError, match="block_size=0"):
        UnlimitedPrefixCache(block_size=0)


def longest_common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(PROMPTS, st.integers(1, 5))
def test_it_is_the_longest_common_prefix_in_whole_blocks(
    prompts: list[tuple[tuple[int, ...], int]], size: int
) -> None:
    cache, seen = UnlimitedPrefixCache(size), []
    for prompt, n in prompts:
        expected = 0
        for _ in range(n):
            common = max((longest_common_prefix(prompt, other) for other in seen), default=0)
            expected += min(common, len(prompt) - 1) // size * size
            seen.append(prompt)
        assert cache.serve(prompt, n) == expected


@given(PROMPTS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_cache_that_forgets_never_serves_more(
    prompts: list[tuple[tuple[int, ...], int]], size: int, random
) -> None:
    unlimited, real = UnlimitedPrefixCache(size), UnlimitedPrefixCache(size)
    for prompt, n in prompts:
        if random.random() < 0.3:
            real = UnlimitedPrefixCache(size)
        assert real.serve(prompt, n) <= unlimited.serve(prompt, n)
