"""The block mask of CUDA's kernel.

The forward pass runs on CPU too. The compiled form and gradients need a GPU.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import depths, forest, permitted
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from rpt_lightning.policy.attention.block_mask import (
    BLOCK,
    bucket_length,
    bucket_lengths,
    flex,
    tree_block_mask,
)
from rpt_lightning.policy.attention.tree_attention import TreeMask

# The trees have few branches, so that some blocks are empty, some full and some partial.
long_forests = st.tuples(
    st.lists(st.tuples(st.integers(0, 3 * BLOCK - 1), st.sampled_from([1, 60, 300])), max_size=6).map(dict),
    st.sampled_from([None, 1, 100, 200]),
)


def grow(branches: dict[int, int]) -> list[int]:
    return forest([branches.get(token, 0) for token in range(3 * BLOCK)])


@settings(max_examples=20, deadline=None)
@given(long_forests)
def test_blocks_are_those_that_torch_finds_by_looking_at_every_pair(case):
    subtree_end, window = grow(case[0]), case[1]
    mask = tree_block_mask(torch.tensor(subtree_end), depths(subtree_end), window=window)
    found = create_block_mask(mask.mask_mod, None, None, 3 * BLOCK, 3 * BLOCK, device="cpu", BLOCK_SIZE=BLOCK)
    if window is None:
        assert torch.equal(mask.to_dense(), found.to_dense())
        assert torch.equal(mask.full_kv_num_blocks, found.full_kv_num_blocks)
    else:  # depth bounds may keep a block that is in fact empty, or treat a full one as partial
        assert (mask.to_dense() >= found.to_dense()).all()
        assert (mask.full_kv_num_blocks <= found.full_kv_num_blocks).all()


@pytest.mark.parametrize("window", [None, 150])
def test_forward_is_that_of_the_dense_mask(window):
    subtree_end = grow({200: 60, 260: 60, 300: 300})
    query, key, value = (torch.randn(1, heads, 3 * BLOCK, 16) for heads in (4, 2, 2))
    with torch.no_grad():
        block_mask = tree_block_mask(torch.tensor(subtree_end), depths(subtree_end), window=window)
        ours = flex(query, key, value, block_mask=block_mask, scale=0.3, enable_gqa=True)
        dense = permitted(subtree_end)
        if window is not None:
            depth = depths(subtree_end)
            dense &= depth[:, None] - depth[None, :] < window
        plain = scaled_dot_product_attention(query, key, value, attn_mask=dense, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert torch.equal(
        TreeMask(torch.tensor(subtree_end), depths(subtree_end)).permitted(window=window), dense
    )


@given(st.integers(1, 40_000), st.integers(1, 20_000))
def test_buckets_are_few_and_near(num_tokens, max_tokens):
    length = bucket_length(num_tokens, max_tokens)
    assert length % BLOCK == 0
    assert bucket_length(length, max_tokens) == length >= num_tokens
    lengths = {bucket_length(n, max_tokens) for n in range(1, max_tokens + 1, 97)} | {
        bucket_length(max_tokens, max_tokens)
    }
    assert lengths == set(bucket_lengths(max_tokens))
    assert len(lengths) <= 5
    # The budget itself is padded to whole blocks only, and beyond it a quarter of it is added at most.
    assert max(lengths) < max_tokens + BLOCK
    if num_tokens > max(lengths):
        assert length < num_tokens + max_tokens / 4 + BLOCK


@pytest.mark.gpu
def test_compiled_gradients_on_a_gpu():
    subtree_end = torch.tensor(grow({200: 60, 260: 60, 300: 300}), device="cuda")
    depth = depths(subtree_end.tolist()).cuda()
    query, key, value = (
        torch.randn(1, heads, 3 * BLOCK, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2)
    )
    ours = flex(query, key, value, block_mask=tree_block_mask(subtree_end, depth), scale=0.3, enable_gqa=True)
    plain = scaled_dot_product_attention(
        query, key, value, attn_mask=TreeMask(subtree_end, depth).permitted(), scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-2)
    upstream = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (query, key, value), upstream),
        torch.autograd.grad(plain, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-2)
