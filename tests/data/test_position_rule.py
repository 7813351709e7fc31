"""Which positions of a document become tasks, by numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rpt_lightning.data.prepare.position_rule import PositionRule
from rpt_lightning.data.prepare.proxy_scores import DocumentScores

# Position 0 has no context, so the proxy scores nothing there.
ENTROPY = [np.nan, 2.0, 0.9, 1.5, 1.1, 1.2, 2.5, 1.8]
TRUE_PROB = [np.nan, 0.30, 0.90, 0.04, 0.05, 0.80, 0.12, 0.001]
TRUE_RANK = [-1, 1, 0, 2, 7, 0, 3, 400]


def kept(**conditions: Any) -> list[int]:
    scores = DocumentScores(
        entropy=np.array(ENTROPY, np.float32),
        true_prob=np.array(TRUE_PROB, np.float32),
        true_rank=np.array(TRUE_RANK, np.int32),
        candidate_ids=np.zeros((8, 16), np.int32),
        candidate_probs=np.zeros((8, 16), np.float32),
    )
    settings = {"entropy_threshold": 1.0, "min_context": 1, "answer_reach": 1, "keep_unanswerable": True}
    rule = PositionRule(**(settings | conditions))
    return rule.positions("d", scores, is_cut=False).tolist()


def test_entropy_alone() -> None:
    assert kept() == [1, 3, 4, 5, 6, 7]
    assert kept(entropy_threshold=0.0) == [1, 2, 3, 4, 5, 6, 7]


def test_a_band_leaves_out_what_is_hopeless_and_what_is_sure() -> None:
    # float32(0.8) is a little above 0.8, and float32(0.05) above 0.05.
    assert kept(min_true_prob=0.05, max_true_prob=0.81) == [1, 4, 5, 6]
    assert kept(min_true_prob=0.05, max_true_prob=0.5) == [1, 4, 6]
    assert kept(max_true_prob=0.1) == [3, 4, 7]


@pytest.mark.parametrize(
    ("max_true_rank", "positions"),
    [(None, [3, 4, 6, 7]), (399, [3, 4, 6]), (7, [3, 4, 6]), (6, [3, 6]), (2, [3]), (1, []), (0, [])],
)
def test_hard_but_inferable(max_true_rank: int | None, positions: list[int]) -> None:
    """The truth has less than 20 %, so it is hard, and it must be among the proxy's candidates."""
    assert kept(max_true_prob=0.2, max_true_rank=max_true_rank) == positions


def test_the_rank_counts_from_0_and_does_not_admit_the_first_token() -> None:
    assert kept(entropy_threshold=0.0, max_true_rank=0) == [2, 5]
