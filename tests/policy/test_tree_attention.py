"""The attention function of layers: sliding windows over paths, and the variants that it refuses."""

from __future__ import annotations

import pytest
import torch
from random_trees import depths, forest, permitted
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rpt_lightning.policy.attention.tree_attention import TreeMask, tree_attention

# A row of 12 tokens, and 8 more after the sixth of them, so that places and depths differ.
BRANCHED = forest([0] * 12 + [6] + [0] * 7)


def test_the_mask_of_a_window_is_made_once_for_all_layers(monkeypatch):
    torch.manual_seed(0)
    made = []
    make = TreeMask.permitted
    monkeypatch.setattr(
        TreeMask,
        "permitted",
        lambda tree, *slices, window=None: made.append(window) or make(tree, *slices, window=window),
    )
    tree, depth = TreeMask(torch.tensor(BRANCHED), depths(BRANCHED)), depths(BRANCHED)
    for window in (4, 6, 4, 6, 4):
        query, key, value = (torch.randn(1, heads, len(BRANCHED), 16) for heads in (4, 2, 2))
        ours, _ = tree_attention(
            nn.Identity(), query, key, value, None, scaling=0.3, tree=tree, sliding_window=window
        )
        allowed = permitted(BRANCHED) & (depth[:, None] - depth[None, :] < window)
        plain = scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(ours, plain.transpose(1, 2), rtol=0, atol=1e-5)
    assert made == [4, 6]


@pytest.mark.parametrize(
    "tree", [None, TreeMask(torch.tensor(BRANCHED), depths(BRANCHED))], ids=["no tree", "tree"]
)
def test_values_of_another_width_than_queries_are_refused(tree):
    query, key, value = (torch.randn(1, 2, len(BRANCHED), width) for width in (16, 16, 8))
    with pytest.raises(ValueError, match="heads of 16 numbers for queries and 8 for values"):
        tree_attention(nn.Identity(), query, key, value, None, tree=tree)
