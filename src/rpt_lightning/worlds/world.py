"""The single interface of a world: a seeded generator of documents with answers that can be worked out.

A world of your own is one class in one file. It writes a document as a list of text pieces and answers:

>>> class Echo(World):
...     "One says a number of words, and the first of them comes back."
...
...     def write(self, rng: random.Random, depth: int) -> list[str | Answer]:
...         words = rng.choices(["red", "blue"], k=depth)
...         first = Answer(text=f" {words[0]}", depth=depth, thought=f" {words[0]}")
...         return ["Say " + " ".join(words) + ". First was", first, "."]
>>> document = next(Echo(num_documents=1, min_depth=2, max_depth=2).documents())
>>> document.text, document.marks[0].fields["depth"], document.marks[0].thought
('Say red red. First was red.', 2, ' red')
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.types import Document, Fields, Mark


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A piece of a document that follows from the text before it.

    ``depth`` is the number of successive steps that it takes to find the piece. ``thought`` writes these
    steps out. It is None if nobody can find the piece. ``fields`` are kept with the position, in addition to
    the depth.
    """

    text: str
    depth: int
    thought: str | None
    fields: Fields = field(default_factory=dict)


class World(CorpusSource):
    """A generated corpus, whose document ``i`` depends on the seed and on ``i`` alone.

    Args:
        num_documents: Number of documents.
        min_depth: Smallest serial depth of a document.
        max_depth: Greatest serial depth of a document. All depths from ``min_depth`` on are equally frequent.
        seed: Seed of the documents. Different seeds give different documents.
    """

    def __init__(
        self, num_documents: int = 10_000, min_depth: int = 1, max_depth: int = 12, seed: int = 0
    ) -> None:
        name = type(self).__name__
        if num_documents < 1:
            raise ValueError(f"{name}: num_documents={num_documents}: give 1 or more")
        if not 1 <= min_depth <= max_depth:
            raise ValueError(
                f"{name}: min_depth={min_depth}, max_depth={max_depth}: give 1 <= min_depth <= max_depth"
            )
        self.num_documents = num_documents
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.seed = seed

    @abstractmethod
    def write(self, rng: random.Random, depth: int) -> list[str | Answer]:
        """Return the pieces of one document whose answers have this serial depth.

        All randomness comes from ``rng``.
        """

    def documents(self) -> Iterator[Document]:
        """Yield all documents in a fixed order."""
        name = type(self).__name__.lower()
        for number in range(self.num_documents):
            # Seeded with text, because its hash is the same in every process and Python version.
            rng = random.Random(f"{name}:{self.seed}:{number}")
            depth = rng.randint(self.min_depth, self.max_depth)
            yield _document(f"{name}-{self.seed}-{number}", self.write(rng, depth))

    def describe(self) -> dict[str, Any]:
        """Return the world's class and settings, which are its public attributes."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"kind": "world", "class": f"{type(self).__module__}.{type(self).__qualname__}", **settings}


def _document(doc_id: str, pieces: list[str | Answer]) -> Document:
    text, marks = "", []
    for piece in pieces:
        if isinstance(piece, Answer):
            end = len(text) + len(piece.text)
            marks.append(
                Mark(
                    start=len(text),
                    end=end,
                    fields={"depth": piece.depth, **piece.fields},
                    thought=piece.thought,
                )
            )
            text += piece.text
        else:
            text += piece
    return Document(doc_id=doc_id, text=text, marks=tuple(marks))
