"""Lets ranks generate together, and end together if one of them loses its engine (all servers are gone, say).

A checkpoint can then still be written.
"""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.rollout.engines.base import EngineLost
from rpt_lightning.rollout.rollouter import Generate
from rpt_lightning.training.distributed.rank_exchange import RankExchange
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.types import Completion, GenerationRequest


def share_generation(generate: Generate, ranks: Ranks | RankExchange) -> Generate:
    """Turn ``generate`` into a collective.

    Tensor-parallel ranks divide the requests that they all make. EngineLost is raised on every rank or on
    none.
    """

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
                f"another rank has lost the engine: {reasons[0] if reasons else 'that rank says why'}"
            )
        return rows

    return ranks.shared(generate_or_end_together)
