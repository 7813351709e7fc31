"""Twelve boxes with notes that each name another box, as pointers to follow."""

from __future__ import annotations

import random

from rpt_lightning.worlds.world import Answer, World

NUM_BOXES = 12


class Boxes(World):
    """Each of twelve boxes holds a note that names another box. A walk follows some notes from one box.

    Unlike in `Cups` and `People`, the text contains everything that the answer depends on in random order,
    and each step looks up a note.

    Args:
        num_documents: Number of documents.
        min_depth: Least number of notes that are followed.
        max_depth: Greatest number of notes that are followed. It is less than the number of boxes, so the
            walk never returns to its start.
        seed: Seed of the documents. Different seeds give different documents.
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
        """Write the notes in random order, then the walk, whose end is the answer."""
        # A single cycle, so that no walk is caught in a short one.
        cycle = rng.sample(range(1, NUM_BOXES + 1), NUM_BOXES)
        note = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        order = rng.sample(range(1, NUM_BOXES + 1), NUM_BOXES)
        notes = " ".join(f"Box {box} says {note[box]}." for box in order)
        box = rng.randint(1, NUM_BOXES)
        text, thought = f"{notes} From box {box} follow {depth} note{'s' if depth > 1 else ''}.", ""
        for left in range(depth, 0, -1):
            thought += f" {left} box {box} says {note[box]}."
            box = note[box]
        return [f"{text} You end at box", Answer(text=f" {box}", depth=depth, thought=thought), "."]
