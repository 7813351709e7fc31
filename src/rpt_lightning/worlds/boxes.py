"""Twelve boxes with notes that name another box: pointers to be followed."""

from __future__ import annotations

import random

from rpt_lightning.worlds.world import Answer, World

NUM_BOXES = 12


class Boxes(World):
    """Each of twelve boxes holds a note that names another box; a walk starts at one and follows some notes.

    Unlike in `Cups` and `People` everything that the answer depends on stands in the text in no order, and each step looks a note up.

    Args:
        num_documents: How many documents there are.
        min_depth: Least number of notes that are followed.
        max_depth: Greatest number of notes that are followed, less than the number of boxes: the walk never comes back.
        seed: Worlds of different seeds write different documents.
    """

    def __init__(
        self, num_documents: int = 10_000, min_depth: int = 1, max_depth: int = 10, seed: int = 0
    ) -> None:
        super().__init__(num_documents, min_depth, max_depth, seed)
        if max_depth >= NUM_BOXES:
            raise ValueError(
                f"Boxes: max_depth={max_depth}: there are {NUM_BOXES} boxes, so give at most {NUM_BOXES - 1}"
            )

    def write(self, rng: random.Random, depth: int) -> list[str | Answer]:
        """The notes in random order, then the walk, whose end is the answer."""
        cycle = rng.sample(
            range(1, NUM_BOXES + 1), NUM_BOXES
        )  # one cycle, so that no walk is caught in a short one
        note = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        order = rng.sample(range(1, NUM_BOXES + 1), NUM_BOXES)
        notes = " ".join(f"Box {box} says {note[box]}." for box in order)
        box = rng.randint(1, NUM_BOXES)
        text, thought = f"{notes} From box {box} follow {depth} note{'s' if depth > 1 else ''}.", ""
        for left in range(depth, 0, -1):
            thought += f" {left} box {box} says {note[box]}."
            box = note[box]
        return [f"{text} You end at box", Answer(text=f" {box}", depth=depth, thought=thought), "."]
