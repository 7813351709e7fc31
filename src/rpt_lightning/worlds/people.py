"""Five people in a row, one of whom has the ball, and neighbours who swap what they have."""

from __future__ import annotations

import random

from rpt_lightning.worlds.world import Answer, World

NAMES = ("Ann", "Bo", "Cy", "Di", "Ed")
LARGEST_FIRST_NUMBER = 19


class People(World):
    """One of five people has the ball, neighbours swap what they have, and the end says who has the ball.

    Swaps of neighbours generate all permutations of five things, S5, the smallest symmetric group that is not
    solvable.

    Args:
        num_documents: Number of documents.
        min_depth: Least number of swaps.
        max_depth: Greatest number of swaps.
        seed: Seed of the documents. Different seeds give different documents.
    """

    def write(self, rng: random.Random, depth: int) -> list[str | Answer]:
        """Write the swaps, and a last sentence with the holder as the answer."""
        holder, number = rng.randrange(5), rng.randint(1, LARGEST_FIRST_NUMBER)
        text, thought = f"{NAMES[holder]} has the ball.", f" {NAMES[holder]}."
        for step in range(number, number + depth):
            left = rng.randrange(4)
            text += f" {step} {NAMES[left]} swaps with {NAMES[left + 1]}."
            if holder in (left, left + 1):
                holder = 2 * left + 1 - holder
            thought += f" {step} {NAMES[left]} {NAMES[holder]}"
        return [
            f"{text} Now the ball is with",
            Answer(text=f" {NAMES[holder]}", depth=depth, thought=f"{thought}."),
            ".",
        ]
