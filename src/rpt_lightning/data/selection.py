"""Which positions of a document become tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.data.scoring import DocumentScores
from rpt_lightning.tasks.answer import answerable_lengths
from rpt_lightning.tasks.token_bytes import TokenBytes

Item = dict[str, Any]


def is_answerable(token_bytes: Sequence[bytes]) -> bool:
    """Whether some prediction that ends on a token boundary of this continuation survives the box parser."""
    return bool(answerable_lengths(token_bytes))


def select_positions(
    scores: DocumentScores, *, entropy_threshold: float, min_context: int, stop: int, min_true_prob: float = 0.0, max_true_prob: float = 1.0
) -> NDArray[np.int32]:
    """Positions in ``[min_context, stop)`` with an entropy above the threshold (paper, section 3.3) and a true probability inside the band. -> [P]"""
    kept = scores.entropy > entropy_threshold  # NaN compares as False
    kept &= (scores.true_prob >= min_true_prob) & (scores.true_prob <= max_true_prob)
    kept[:min_context] = False
    kept[stop:] = False
    return np.flatnonzero(kept).astype(np.int32)


def make_item(
    doc_id: str,
    token_ids: NDArray[np.int32],
    scores: DocumentScores,
    positions: NDArray[np.int32],
    *,
    token_bytes: TokenBytes,
    reach: int,
    keep_unanswerable: bool,
) -> tuple[Item, int]:
    """The stored item (docs/architecture.md) and how many of ``positions`` are unanswerable, kept or not."""
    pieces = [token_bytes[int(token)] for token in token_ids]
    answerable = np.array([is_answerable(pieces[p : p + reach]) for p in positions.tolist()], dtype=np.uint8)  # [P]
    num_unanswerable = int((answerable == 0).sum())
    if not keep_unanswerable:
        positions, answerable = positions[answerable == 1], answerable[answerable == 1]
    item = {
        "doc_id": doc_id,
        "token_ids": token_ids,
        "positions": positions,
        "entropy": scores.entropy[positions],
        "true_prob": scores.true_prob[positions],
        "true_rank": scores.true_rank[positions],
        "answerable": answerable,
        "candidate_ids": scores.candidate_ids[positions],
        "candidate_probs": scores.candidate_probs[positions],
    }
    return item, num_unanswerable
