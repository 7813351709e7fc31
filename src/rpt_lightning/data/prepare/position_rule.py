"""Select the positions of a document that become tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.data.modules.random_draw import uniform
from rpt_lightning.data.prepare.proxy_scores import DocumentScores
from rpt_lightning.data.store.item_format import MATERIAL, Item
from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.box import answerable_lengths
from rpt_lightning.objectives.split_documents import SplitDocuments


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """How many positions of a document passed the other conditions but failed one of these two.

    ``unanswerable`` counts those for which no right answer fits into a box, whether they are kept or not.
    ``without_material`` counts those for which the objective found nothing to ask about
    (``Objective.material``).
    """

    unanswerable: int = 0
    without_material: int = 0


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    """The conditions that a position must meet to become a task.

    It needs enough entropy (nats; paper, section 3.3), enough context, and a true probability inside the
    learnability band. With ``max_true_rank`` the true token must also be among the proxy's most likely ones
    (0 = the most likely), so that it can be inferred although it is not expected. This is the idea of REER-PT
    (arXiv:2608.30627) in its simplest form, and not its formula. With ``random_share`` each position passes
    with that probability, whatever its entropy. An ``objective`` may refuse further positions.

    A position is answerable if some prediction that ends on a token boundary within ``answer_reach`` tokens
    survives the box parser. The prompt is not chosen yet, so the box is parsed as if it came after
    ``</think>``. For a template with another closing marker, the flag is wrong if the truth holds either
    marker.
    """

    entropy_threshold: float
    min_context: int
    answer_reach: int
    keep_unanswerable: bool
    min_true_prob: float = 0.0
    max_true_prob: float = 1.0
    max_true_rank: int | None = None
    objective: Objective | None = None
    random_share: float | None = None
    seed: int = 0

    def positions(self, doc_id: str, scores: DocumentScores, *, is_cut: bool) -> NDArray[np.int32]:
        """Select the positions of a document that pass, answerable or not. -> [P].

        At the end of a document that ``is_cut`` the true continuation is unknown. A right answer of several
        tokens would count as wrong there.
        """
        kept = self._drawn(doc_id, scores)  # [L]
        kept &= (scores.true_prob >= self.min_true_prob) & (scores.true_prob <= self.max_true_prob)
        if self.max_true_rank is not None:
            kept &= scores.true_rank <= self.max_true_rank  # position 0 has rank -1, but never enough context
        kept[: self.min_context] = False
        if is_cut:
            kept[max(0, len(kept) - self.answer_reach + 1) :] = False
        return np.flatnonzero(kept).astype(np.int32)

    def _drawn(self, doc_id: str, scores: DocumentScores) -> NDArray[np.bool_]:
        """Select the positions of a document by entropy or at random. -> [L].

        A random choice depends on the seed, the document and the position alone.
        """
        if self.random_share is None:
            return scores.entropy > self.entropy_threshold  # the NaN of position 0 compares as False
        chances = [uniform(self.seed, f"{doc_id}:{position}") for position in range(len(scores.entropy))]
        return ~np.isnan(scores.entropy) & (np.array(chances) < self.random_share)

    def item(
        self,
        documents: SplitDocuments,
        number: int,
        token_ids: NDArray[np.int32],
        scores: DocumentScores,
    ) -> tuple[Item, LeftOut]:
        """Build the stored item of document ``number`` of the split (docs/architecture.md)."""
        positions = self.positions(documents.doc_ids[number], scores, is_cut=documents.is_cut[number])
        pieces = documents.pieces(number)
        objective, num_passed = self.objective, len(positions)
        if objective is not None:
            kept = [p for p in positions.tolist() if objective.may_ask(pieces, p)]
            positions, num_passed = np.array(kept, dtype=np.int32), len(kept)
        materials: dict[int, str] = {}
        if objective is not None and objective.has_material:
            made = {p: objective.material(documents, number, p) for p in positions.tolist()}
            materials = {p: text for p, text in made.items() if text is not None}
            positions = np.array(list(materials), dtype=np.int32)
        answerable = np.array(
            [
                bool(answerable_lengths(pieces[p : p + self.answer_reach]))
                if objective is None
                else objective.is_answerable(pieces, p, reach=self.answer_reach)
                for p in positions.tolist()
            ],
            dtype=np.uint8,
        )  # [P]
        left_out = LeftOut(
            unanswerable=int((answerable == 0).sum()), without_material=num_passed - len(positions)
        )
        if not self.keep_unanswerable:
            positions, answerable = positions[answerable == 1], answerable[answerable == 1]
        item = {
            "doc_id": documents.doc_ids[number],
            "token_ids": token_ids,
            "positions": positions,
            "entropy": scores.entropy[positions],
            "true_prob": scores.true_prob[positions],
            "true_rank": scores.true_rank[positions],
            "answerable": answerable,
            "candidate_ids": scores.candidate_ids[positions],
            "candidate_probs": scores.candidate_probs[positions],
        }
        if objective is not None and objective.has_material:
            item[MATERIAL] = [materials[p] for p in positions.tolist()]
        return item, left_out
