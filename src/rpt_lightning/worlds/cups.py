"""A ball under one of eight cups, and moves that shuffle the cups."""

from __future__ import annotations

import random
from collections.abc import Mapping

from rpt_lightning.worlds.world import Answer, World

# The position of the ball after a move, for cups 1 to 8. The moves do not commute, so counting them does not
# help.
MOVES: Mapping[str, tuple[int, ...]] = {
    "turn": (2, 3, 4, 5, 6, 7, 8, 1),  # to the next cup
    "flip": (2, 1, 3, 4, 5, 6, 7, 8),  # the first two swap places
    "cross": (8, 7, 6, 5, 4, 3, 2, 1),  # reversed
    "split": (1, 3, 5, 7, 2, 4, 6, 8),  # two halves, interleaved: 1 5 2 6 3 7 4 8
}
LARGEST_FIRST_NUMBER = 19


class Cups(World):
    """A ball is under a cup, numbered moves shuffle the cups, and the end of the text says where the ball is.

    The permutations generate a group that is not solvable. A fixed number of layers therefore cannot follow
    the ball over any number of moves (arXiv:2402.12875). A thought that writes the cup after each move can.

    Args:
        num_documents: Number of documents.
        min_depth: Least number of moves.
        max_depth: Greatest number of moves.
        noise: Fraction of the documents whose last sentence names a random cup. Nothing in the text marks
            these documents, so their answer cannot be predicted. Their field ``noise`` is 1.
        seed: Seed of the documents. Different seeds give different documents.
    """

    def __init__(
        self,
        num_documents: int = 10_000,
        min_depth: int = 1,
        max_depth: int = 12,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_documents, min_depth, max_depth, seed)
        if not 0 <= noise <= 1:
            raise ValueError(f"Cups: noise={noise}: give a share from 0 to 1")
        self.noise = noise

    def write(self, rng: random.Random, depth: int) -> list[str | Answer]:
        """Write the game, whose last sentence has the cup as the answer."""
        cup, number = rng.randint(1, 8), rng.randint(1, LARGEST_FIRST_NUMBER)
        game, thought = f"The ball is under cup {cup}.", f" cup {cup}."
        for step in range(number, number + depth):
            move = rng.choice(list(MOVES))
            cup = MOVES[move][cup - 1]
            game += f" {step} {move}"
            thought += f" {step} {move} {cup}"
        if rng.random() < self.noise:
            anything = Answer(text=f" {rng.randint(1, 8)}", depth=depth, thought=None, fields={"noise": 1})
            return [f"{game}. The ball is under cup", anything, "."]
        fields = {"noise": 0} if self.noise else {}
        return [
            f"{game}. The ball is under cup",
            Answer(text=f" {cup}", depth=depth, thought=f"{thought}.", fields=fields),
            ".",
        ]
