"""Scores of logits against a full sort of the vocabulary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.data.prepare import token_scores
from rpt_lightning.data.prepare.token_scores import largest, ranks, score_logits


def test_of_equal_logits_the_lower_id_ranks_first() -> None:
    """Rank 0 is the token that argmax selects."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0]]).repeat(5, 1)
    assert ranks(logits, torch.arange(5)).tolist() == [4, 0, 3, 1, 2]
    assert logits[0].argmax() == 1
    values, ids = largest(logits[:1], 4)
    assert values.tolist() == [[3, 3, 3, 2]]
    assert ids.tolist() == [[1, 3, 4, 2]]


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(20, 3000),
    st.integers(1, 16),
    st.sampled_from([3, 100, 10**6]),
)
def test_largest_and_ranks_equal_a_stable_sort(
    seed: int, num_rows: int, vocabulary: int, k: int, num_values: int
) -> None:
    """With few different values most logits are equal. The vocabulary need not be a multiple of the group."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(num_values, (num_rows, vocabulary), generator=generator).float()
    expected, order = logits.sort(dim=-1, descending=True, stable=True)
    values, ids = largest(logits, k)
    assert torch.equal(values, expected[:, :k])
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())
    is_same_value = values[:, 1:] == values[:, :-1]
    assert bool((ids[:, 1:] > ids[:, :-1])[is_same_value].all())
    true_ids = torch.randint(vocabulary, (num_rows,), generator=generator)
    assert torch.equal(order.gather(1, ranks(logits, true_ids).long()[:, None])[:, 0], true_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 5000, 2**21])
def test_scores_equal_a_softmax_whatever_the_block(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_scores, "BLOCK_LOGITS", block)
    torch.manual_seed(0)
    logits = (4 * torch.randn(7, 2000)).to(dtype)
    logits[3] += 500  # a plain sum of exponentials would overflow
    before = logits.clone()
    true_ids = torch.randint(2000, (7,))
    scores = score_logits(logits, true_ids, 16)
    assert torch.equal(logits, before)
    probs = logits.double().softmax(-1)
    top = probs.sort(dim=-1, descending=True, stable=True).values[:, :16]
    share = top / top.sum(-1, keepdim=True)
    expected = {
        "entropy": -(share * share.log()).sum(-1),
        "true_prob": probs.gather(1, true_ids[:, None])[:, 0],
        "candidate_probs": top,
    }
    for name, values in expected.items():
        torch.testing.assert_close(scores[name].double(), values, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(probs.gather(1, scores["candidate_ids"].long()), top, rtol=0, atol=0)
    assert scores["true_rank"].dtype == torch.int32
    before_true = logits > logits.gather(1, true_ids[:, None])
    before_true |= (logits == logits.gather(1, true_ids[:, None])) & (torch.arange(2000) < true_ids[:, None])
    assert torch.equal(scores["true_rank"].long(), before_true.sum(-1))
