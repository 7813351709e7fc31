"""Games of cups in which the end of the text says where the ball was at the beginning, and backwards."""

from __future__ import annotations

import random

from rpt_lightning.worlds.cups import MOVES
from rpt_lightning.worlds.world import Answer, World


class Origins(World):
    """The moves of `Cups`, with two places to find: where the ball began (from the end) and where it ended.

    The field ``place`` says which. The first place follows only from the text after it. To find it, start at
    the last place and undo the moves. A reader who goes from left to right can only guess it, with a chance
    of 1 in 8. The last place follows from the text before it, as in `Cups`. Games are numbered from 1, so
    that nothing but the places and the moves is uncertain.

    Args:
        num_documents: Number of documents.
        min_depth: Least number of moves.
        max_depth: Greatest number of moves.
        untold: Fraction of the documents that do not say where the ball ended. Their first place cannot be
            worked out at all. Their field ``told`` is 0.
        seed: Seed of the documents. Different seeds give different documents.
    """

    def __init__(
        self,
        num_documents: int = 10_000,
        min_depth: int = 1,
        max_depth: int = 12,
        untold: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_documents, min_depth, max_depth, seed)
        if not 0 <= untold <= 1:
            raise ValueError(f"Origins: untold={untold}: give a share from 0 to 1")
        self.untold = untold

    def write(self, rng: random.Random, depth: int) -> list[str | Answer]:
        """Write the game, with its first place and its last one (unless it is untold) as answers."""
        cups, moves = [rng.randint(1, 8)], []
        for _ in range(depth):
            moves.append(rng.choice(list(MOVES)))
            cups.append(MOVES[moves[-1]][cups[-1] - 1])
        game = "".join(f" {step} {move}" for step, move in enumerate(moves, start=1))
        forward = "".join(f" {step} {move} {cups[step]}" for step, move in enumerate(moves, start=1))
        backward = "".join(f" {step} {moves[step - 1]} {cups[step - 1]}" for step in range(depth, 0, -1))
        is_told = rng.random() >= self.untold
        first = Answer(
            text=f" {cups[0]}",
            depth=depth,
            thought=f" cup {cups[-1]}.{backward}." if is_told else None,
            fields={"place": "first", "told": int(is_told)},
        )
        if not is_told:
            return ["The ball is under cup", first, f".{game}. Nobody looks."]
        last = Answer(
            text=f" {cups[-1]}",
            depth=depth,
            thought=f" cup {cups[0]}.{forward}.",
            fields={"place": "last", "told": 1},
        )
        return ["The ball is under cup", first, f".{game}. The ball is under cup", last, "."]
