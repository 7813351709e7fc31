"""Worked examples for the objectives about sentences, made from a source whose marks have thoughts.

`CorpusDataModule` writes worked examples of what a source marks. A world marks a word, such as the last cup.
These sources mark what the objectives ask for instead: the sentence with that word, or its letter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.objectives.next_sentence import LETTERS, question_parts
from rpt_lightning.objectives.sentences import sentence_spans
from rpt_lightning.types import Document, Mark


class SentenceAnswers(CorpusSource):
    """Another source, whose marks cover the whole sentence that they lie in, and the space before it.

    Its worked examples answer with a sentence, as `NextSegmentObjective` expects. The fields of a mark are
    then those of its sentence, so accuracy can be broken down by depth.

    Args:
        source: The source of the text and of the marks.
    """

    def __init__(self, source: CorpusSource) -> None:
        self.source = source

    def documents(self) -> Iterator[Document]:
        """Yield the documents of the source. Marks outside of a sentence stay as they are."""
        for document in self.source.documents():
            spans = sentence_spans(document.text)
            yield replace(
                document, marks=tuple(_whole(mark, spans, document.text) for mark in document.marks)
            )

    def describe(self) -> dict[str, Any]:
        return _described(self, self.source)


class SentenceChoices(CorpusSource):
    """The text of another source before a marked sentence, the candidates for it, and the right letter.

    The worked examples answer as `NextSentenceObjective` expects. The wrong candidates are marked sentences
    of other documents, which differ from the true one only in what has to be worked out.

    Args:
        source: The source of the text and of the marks. Each document needs a mark. The last one counts.
        num_candidates: Number of candidates.
        seed: Seed of the candidates and their order.
    """

    def __init__(self, source: CorpusSource, num_candidates: int = 4, seed: int = 0) -> None:
        if not 2 <= num_candidates <= len(LETTERS):
            raise ValueError(
                f"SentenceChoices: num_candidates={num_candidates}: give a number from 2 to {len(LETTERS)}"
            )
        self.source = source
        self.num_candidates = num_candidates
        self.seed = seed

    def documents(self) -> Iterator[Document]:
        """Yield one document for each of the source's.

        Raises ValueError if a document has no mark, or if there are too few different sentences.
        """
        documents = list(SentenceAnswers(self.source).documents())
        answers = [_last_answer(document) for document in documents]
        different = sorted(set(answers))
        if len(different) < self.num_candidates:
            raise ValueError(
                f"SentenceChoices: {type(self.source).__name__} marks only {len(different)} different "
                f"sentences, but num_candidates={self.num_candidates}; lower it or give another source"
            )
        for document, answer in zip(documents, answers, strict=True):
            rng = random.Random(f"{self.seed}:{document.doc_id}")
            # One more than needed, since one of them may be the answer.
            drawn = [text for text in rng.sample(different, self.num_candidates) if text != answer]
            wrong = drawn[: self.num_candidates - 1]
            right = rng.randrange(self.num_candidates)
            candidates = [*wrong[:right], answer, *wrong[right:]]
            mark = document.marks[-1]
            text = document.text[: mark.start] + "".join(question_parts(candidates)) + "\n" + LETTERS[right]
            yield replace(document, text=text, marks=(replace(mark, start=len(text) - 1, end=len(text)),))

    def describe(self) -> dict[str, Any]:
        return _described(self, self.source) | {"num_candidates": self.num_candidates, "seed": self.seed}


def _whole(mark: Mark, spans: list[tuple[int, int]], text: str) -> Mark:
    """Return the mark over its whole sentence and the space before it."""
    for start, end in spans:
        if start <= mark.end - 1 < end:
            return replace(mark, start=len(text[:start].rstrip()), end=end)
    return mark


def _last_answer(document: Document) -> str:
    if not document.marks:
        raise ValueError(
            f"SentenceChoices: document {document.doc_id!r} has no mark, so nothing says what to ask about; "
            "give a source that marks what can be worked out"
        )
    mark = document.marks[-1]
    return " ".join(document.text[mark.start : mark.end].split())


def _described(wrapper: CorpusSource, source: CorpusSource) -> dict[str, Any]:
    kind = type(wrapper)
    return {
        "kind": "sentences",
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "source": source.describe(),
    }
