"""How ranks generate together, and end together where one of them has lost its engine (all servers are gone, say): a checkpoint can then still be written."""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.rollout.engine import EngineLost
from rpt_lightning.rollout.rollouter import Generate
from rpt_lightning.training.rank_exchange import RankExchange
from rpt_lightning.training.ranks import Ranks
from rpt_lightning.types import Completion, GenerationRequest


def share_generation(generate: Generate, ranks: Ranks | RankExchange) -> Generate:
    """``generate`` as a collective: tensor-parallel ranks divide what they all ask for, and EngineLost is raised on every rank or on none."""

    def generate_or_end_together(requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        rows: list[list[Completion]] = []
        lost: EngineLost | None = None
        try:
            rows = generate(requests)
        except EngineLost as error:
            lost = error
        if ranks.any(lost is not None):
            reasons = [
                reason for reason in ranks.gather(None if lost is None else str(lost)) if reason is not None
            ]
            raise lost or EngineLost(
                f"another rank has lost the engine: {reasons[0] if reasons else 'it says why'}"
            )
        return rows

    return ranks.shared(generate_or_end_together)
