"""Worked examples of whole sentences and of choices fit the objectives that they prepare for."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from rpt_lightning.data.modules.worked_examples import ExampleWriter, Phase
from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.objectives.next_segment import NextSegmentObjective
from rpt_lightning.objectives.next_sentence import Choice, NextSentenceObjective
from rpt_lightning.objectives.split_documents import SplitDocuments
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Document, TokenTask
from rpt_lightning.worlds import Boxes, Cups, People, SentenceAnswers, SentenceChoices

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def cups_tokenizer(tmp_path_factory):
    sys.path.insert(0, str(SCRIPTS))
    folder = tmp_path_factory.mktemp("models") / "cups"
    importlib.import_module("make_model").make("world", folder, world="Cups", seed=0)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("world", [Cups, People, Boxes])
def test_marks_cover_the_sentence_and_its_space(world):
    plain = list(world(num_documents=20).documents())
    whole = list(SentenceAnswers(world(num_documents=20)).documents())
    for before, after in zip(plain, whole, strict=True):
        assert (before.text, before.doc_id) == (after.text, after.doc_id)
        for word, sentence in zip(before.marks, after.marks, strict=True):
            text = after.text[sentence.start : sentence.end]
            assert text.startswith(" ")
            assert text.endswith(".")
            assert text.count(".") == 1
            assert before.text[word.start : word.end] in text
            assert (word.thought, word.fields) == (sentence.thought, sentence.fields)


def task_of(objective: Any, document: Document, tokens: TokenBytes, material: str | None = None) -> TokenTask:
    ids = tokens.encode_plain(document.text)
    documents = SplitDocuments([document.doc_id], [np.array(ids, dtype=np.int32)], [False], tokens)
    pieces = documents.pieces(0)
    position = max(place for place in range(len(ids)) if objective.may_ask(pieces, place))
    material = objective.material(documents, 0, position) if material is None else material
    return TokenTask(
        task_id=f"{document.doc_id}:{position}", doc_id=document.doc_id, position=position,
        context_ids=ids[:position], continuation_ids=ids[position : position + 8],
        continuation=pieces[position : position + 8], entropy=1.0, true_prob=0.5, true_rank=0,
        answerable=True, material=material or "",
    )  # fmt: skip


def test_worked_examples_of_segments_are_answers_to_the_objective(cups_tokenizer):
    bound = NextSegmentObjective().bind(cups_tokenizer)
    writer = ExampleWriter(bound.prompt, bound.tokens, [Phase()], seed=0)
    for document in SentenceAnswers(Cups(num_documents=10)).documents():
        task = task_of(bound.objective, document, bound.tokens)
        (example,) = writer.write(document, step=0)
        assert example.prompt_ids == bound.prompt_ids(task)
        completion = bound.tokens.join(example.target_ids[:-1])
        prediction = bound.objective.read(completion, think_close=bound.prompt.think_close)
        assert bound.is_right(prediction, task)
        # It ends with the very tokens that accuracy without a thought asks for.
        truth = bound.direct_sequence(task).target_ids
        assert example.target_ids[-len(truth) - 1 : -1] == truth


def test_worked_examples_of_choices_are_answers_to_the_objective(cups_tokenizer):
    bound = NextSentenceObjective().bind(cups_tokenizer)
    writer = ExampleWriter(bound.prompt, bound.tokens, [Phase()], seed=0)
    plain = list(Cups(num_documents=40).documents())
    letters = Counter[str]()
    for before, document in zip(plain, SentenceChoices(Cups(num_documents=40)).documents(), strict=True):
        (mark,) = document.marks
        lines = document.text[: mark.start].splitlines()
        candidates = tuple(line[3:] for line in lines[-4:])
        letter = document.text[mark.start : mark.end]
        letters[letter] += 1
        choice = Choice(candidates=candidates, right="ABCD".index(letter))
        truth = before.text.rsplit(". ", 1)[1]
        assert candidates.count(truth) == 1
        assert len(set(candidates)) == 4
        assert candidates[choice.right] == truth
        task = task_of(bound.objective, before, bound.tokens, choice.to_text())
        (example,) = writer.write(document, step=0)
        assert example.prompt_ids == bound.prompt_ids(task)
        completion = bound.tokens.join(example.target_ids[:-1])
        prediction = bound.objective.read(completion, think_close=bound.prompt.think_close)
        assert bound.is_right(prediction, task)
    assert set(letters) == set("ABCD")


def test_the_same_each_time_and_described():
    source = SentenceChoices(Cups(num_documents=5), num_candidates=3, seed=2)
    assert list(source.documents()) == list(source.documents())
    assert source.describe() == {
        "kind": "sentences",
        "class": "rpt_lightning.worlds.whole_sentences.SentenceChoices",
        "source": Cups(num_documents=5).describe(),
        "num_candidates": 3,
        "seed": 2,
    }


class Unmarked(CorpusSource):
    def documents(self) -> Iterator[Document]:
        yield Document(doc_id="a", text="It rained a lot.")

    def describe(self) -> dict[str, Any]:
        return {}


def test_what_cannot_be_made():
    with pytest.raises(ValueError, match="document 'a' has no mark, so nothing says what to ask about"):
        list(SentenceChoices(Unmarked()).documents())
    with pytest.raises(ValueError, match="People marks only 5 different sentences, but num_candidates=6"):
        list(SentenceChoices(People(num_documents=200), num_candidates=6).documents())
    with pytest.raises(ValueError, match="num_candidates=1: give a number from 2 to 10"):
        SentenceChoices(Cups(), num_candidates=1)
