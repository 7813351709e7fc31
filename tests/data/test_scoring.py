from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rpt_lightning.data.prepare.proxy_scores import NUM_CANDIDATES, ProxyScorer, windows


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


def scorer(model, **settings) -> ProxyScorer:
    return ProxyScorer(model, **({"window": 1000, "overlap": 10, "batch_tokens": 4000} | settings))


def random_documents(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 512, length).astype(np.int32) for length in lengths]


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_windows_score_every_input_once_with_the_most_context(
    num_inputs: int, window: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, window - 1))
    covered = []
    for start, first, stop in windows(num_inputs, window, overlap):
        assert 0 <= start <= first < stop <= num_inputs
        assert stop - start <= window
        covered += range(first, stop)
        if start > 0:  # a window that does not start at the document's beginning
            assert first - start + 1 >= overlap
    assert covered == list(range(num_inputs))


def test_scores_equal_a_plain_softmax(model) -> None:
    (ids,) = random_documents(12)
    (scores,) = scorer(model).score([ids])
    with torch.no_grad():
        probs = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double().softmax(-1)
    assert math.isnan(scores.entropy[0])
    assert scores.true_rank[0] == -1
    for position in range(1, 12):
        row = probs[position - 1]
        top = row.sort(descending=True)
        assert scores.true_prob[position] == pytest.approx(float(row[ids[position]]), rel=1e-4)
        assert scores.true_rank[position] == int((row > row[ids[position]]).sum())
        assert scores.candidate_ids[position].tolist() == top.indices[:NUM_CANDIDATES].tolist()
        assert scores.candidate_probs[position].tolist() == pytest.approx(
            top.values[:NUM_CANDIDATES].tolist(), rel=1e-4
        )
        share = top.values[:NUM_CANDIDATES] / top.values[:NUM_CANDIDATES].sum()
        assert scores.entropy[position] == pytest.approx(float(-(share * share.log()).sum()), rel=1e-4)


@pytest.mark.parametrize(
    "unused_ids", [tuple(range(448, 512)), (0, 3, 77, *range(450, 512))], ids=["behind", "between"]
)
def test_rows_that_are_no_token_cannot_come(model, unused_ids: tuple[int, ...]) -> None:
    """Scores equal those of a softmax over the tokens alone."""
    ids = (random_documents(30)[0] % 300 + 100).astype(np.int32)
    (plain,) = scorer(model).score([ids])
    assert np.isin(plain.candidate_ids[1:], unused_ids).any()
    (scores,) = scorer(model, unused_ids=unused_ids).score([ids])
    assert not np.isin(scores.candidate_ids[1:], unused_ids).any()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double()
    logits[:, list(unused_ids)] = -math.inf
    probs = logits.softmax(-1)
    for position in range(1, 30):
        row = probs[position - 1]
        top = row.sort(descending=True).values[:NUM_CANDIDATES]
        assert scores.true_prob[position] == pytest.approx(float(row[ids[position]]), rel=1e-4)
        assert scores.true_rank[position] == int((row > row[ids[position]]).sum())
        assert scores.candidate_probs[position].tolist() == pytest.approx(top.tolist(), rel=1e-4)
        share = top / top.sum()
        assert scores.entropy[position] == pytest.approx(float(-(share * share.log()).sum()), rel=1e-4)


def test_scores_under_autocast_are_those_of_the_models_own_logits(model) -> None:
    """Rounded to bf16, many logits are equal. Rank and candidates still agree: the lower id comes first."""

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    (ids,) = random_documents(60)
    (scores,) = scorer(model, autocast=autocast).score([ids])
    with torch.no_grad(), autocast():
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None, :-1]).logits[0]
    assert logits.dtype == torch.bfloat16
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices
    probs = logits.double().softmax(-1)
    for position in range(1, 60):
        assert order[position - 1, scores.true_rank[position]] == ids[position]
        assert scores.candidate_ids[position, 0] == logits[position - 1].argmax()
        assert scores.true_prob[position] == pytest.approx(
            float(probs[position - 1, ids[position]]), rel=1e-4
        )


def test_batch_size_and_company_do_not_matter(model) -> None:
    documents = random_documents(30, 5, 2, 17, 30, 1)
    together = scorer(model).score(documents)
    for settings in ({"batch_tokens": 1}, {"batch_tokens": 64}):
        for left, right in zip(together, scorer(model, **settings).score(documents), strict=True):
            np.testing.assert_allclose(left.entropy, right.entropy, atol=1e-5)
            np.testing.assert_allclose(left.candidate_probs, right.candidate_probs, atol=1e-6)
            np.testing.assert_array_equal(left.true_rank, right.true_rank)


def test_windows_equal_the_full_context_where_the_model_sees_no_further(model) -> None:
    """The first window has the whole context. A later window equals a document that begins at its start."""
    (ids,) = random_documents(100)
    (full,) = scorer(model).score([ids])
    (windowed,) = scorer(model, window=40, overlap=30).score([ids])
    np.testing.assert_allclose(windowed.entropy[:41], full.entropy[:41], atol=1e-5)
    assert not np.allclose(windowed.entropy[41:], full.entropy[41:], atol=1e-5)
    pieces = list(windows(99, 40, 30))
    assert len(pieces) == 7
    for start, first, stop in pieces:
        (alone,) = scorer(model).score([ids[start : stop + 1]])
        np.testing.assert_allclose(
            windowed.entropy[first + 1 : stop + 1], alone.entropy[first + 1 - start :], atol=1e-5
        )
    assert not np.isnan(windowed.entropy[1:]).any()


def test_windowed_scores_of_a_model_with_a_short_sight(tiny_model_dir: Path) -> None:
    """One layer sees 8 tokens back (sliding attention): overlaps of 8 or more give the full scores."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = MistralForCausalLM(config).eval()
    ids = (random_documents(90)[0] % 64).astype(np.int32)
    (full,) = scorer(model).score([ids])
    (windowed,) = scorer(model, window=20, overlap=10).score([ids])
    np.testing.assert_allclose(windowed.entropy, full.entropy, atol=1e-5)
    (careless,) = scorer(model, window=20, overlap=1).score([ids])
    assert not np.allclose(careless.entropy[1:], full.entropy[1:], atol=1e-5)


def test_start_ids_are_seen_and_not_scored(model) -> None:
    (ids,) = random_documents(10)
    (plain,) = scorer(model).score([np.concatenate([[7], ids]).astype(np.int32)])
    (started,) = scorer(model, start_ids=(7,)).score([ids])
    np.testing.assert_allclose(started.entropy[1:], plain.entropy[2:], atol=1e-5)


def test_limits(model) -> None:
    with pytest.raises(ValueError, match="--overlap 40: must be at least 1 and less than --window 40"):
        scorer(model, window=40, overlap=40)
    with pytest.raises(ValueError, match="--window 2000: the proxy reads at most 1024 tokens"):
        scorer(model, window=2000)


def test_a_model_that_changes_its_logits_behind_the_head_is_refused(model) -> None:
    class Capped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.base_model, self.config = model, model.base_model, model.config

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.inner.get_output_embeddings()

        def forward(self, **kwargs):
            output = self.inner(**kwargs)
            output.logits = output.logits * 3
            return output

    with pytest.raises(ValueError, match="changes its logits after the output layer"):
        scorer(Capped())
