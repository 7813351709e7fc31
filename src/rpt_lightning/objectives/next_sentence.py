r"""Which of several sentences comes next? BERT's next-sentence prediction (arXiv:1810.04805), as a choice.

BERT tells the true next sentence from a random one of another document. ALBERT (arXiv:1909.11942) found that
too easy, since the topic gives it away, and took sentences of the same text instead. Here the policy chooses
among k candidates, and each wrong one comes from the same document or from another one of the same split. It
answers with a letter in a box, and no judge is needed.

`rpt prepare` draws the candidates and stores them with the task. So a run reads no other documents, and every
policy is asked the same. They depend on the seed, the document, the position, and the split's documents.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rpt_lightning.objectives.about_sentences import (
    MAX_TOKENS,
    MIN_WORDS,
    AboutSentences,
    material_of,
)
from rpt_lightning.objectives.prompts.template import PromptTemplate
from rpt_lightning.objectives.rewards.answer import choice_letter
from rpt_lightning.objectives.sentences import Sentence
from rpt_lightning.objectives.split_documents import SplitDocuments
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Task, TokenIds

LETTERS = "ABCDEFGHIJ"
# Other documents that are looked into for one candidate before the task is given up.
NUM_TRIES = 64

# What a chat model is told around the candidates. The words are our own.
ASK = (
    "\n\n---\nThe text above breaks off. One of these sentences comes next:",
    "\nThink about which one it is. Then write its letter in \\boxed{}.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The candidates of a task, in the order of their letters, and the number of the right one (from 0).

    >>> choice = Choice(candidates=("We ran.", "It rained."), right=1)
    >>> choice.letter, Choice.from_text(choice.to_text()) == choice
    ('B', True)
    """

    candidates: tuple[str, ...]
    right: int

    @property
    def letter(self) -> str:
        return LETTERS[self.right]

    def to_text(self) -> str:
        return json.dumps({"candidates": self.candidates, "right": self.right})

    @staticmethod
    @lru_cache(4096)
    def from_text(text: str) -> Choice:
        stored = json.loads(text)
        return Choice(candidates=tuple(stored["candidates"]), right=stored["right"])


class NextSentenceObjective(AboutSentences):
    """Choose the sentence that comes next among k candidates, by its letter (BERT, arXiv:1810.04805).

    A prediction is right if it is the letter of the true sentence. Without a thought, the policy writes the
    letter into a box that is already open, after the same prompt. A guess is right with probability 1 /
    num_candidates.

    Args:
        prompt: How the policy is prompted. QuestionPrompt asks in words, for chat models. None means
            ContinuationPrompt, which shows only the text and the candidates.
        num_candidates: Number of candidates, from 2 to 10.
        num_from_others: Number of candidates from other documents of the split. 0 takes all from the document
            itself.
        same_document: Which sentences of the document itself are candidates. "behind" takes those that follow
            the true one, which the policy has not seen. "any" also takes those before it.
        hardest_of: For each candidate from another document, draw this many sentences and take the one that
            has the most words in common with the true one. 1 takes any sentence.
        max_tokens: Longest sentence in tokens.
        min_words: Shortest sentence in words.
        seed: Seed of the candidates and their order.
    """

    def __init__(
        self,
        prompt: PromptTemplate | None = None,
        num_candidates: int = 4,
        num_from_others: int = 1,
        same_document: Literal["behind", "any"] = "behind",
        hardest_of: int = 1,
        max_tokens: int = MAX_TOKENS,
        min_words: int = MIN_WORDS,
        seed: int = 0,
    ) -> None:
        super().__init__(prompt, max_tokens=max_tokens, min_words=min_words)
        if not 2 <= num_candidates <= len(LETTERS):
            raise ValueError(
                f"--rollout.objective.num_candidates {num_candidates}: give a number from 2 to {len(LETTERS)}"
            )
        if not 0 <= num_from_others < num_candidates:
            raise ValueError(
                f"--rollout.objective.num_from_others {num_from_others}: one of the --num_candidates "
                f"{num_candidates} is the true sentence; give a number from 0 to {num_candidates - 1}"
            )
        if hardest_of < 1:
            raise ValueError(f"--rollout.objective.hardest_of {hardest_of}: must be at least 1")
        self.num_candidates = num_candidates
        self.num_from_others = num_from_others
        self.same_document = same_document
        self.hardest_of = hardest_of
        self.seed = seed
        words = sum(map(len, ASK)) if self.is_chat else 1
        self.num_added_tokens = words + num_candidates * (len("\nA:") + max_tokens)

    @property
    def places(self) -> str:
        """The candidates are stored in the task folder, so the run must have been given the same settings."""
        own = self.num_candidates - 1 - self.num_from_others
        return (
            f"next sentence, 1 of {self.num_candidates} ({own} {self.same_document} in the document, "
            f"{self.num_from_others} of other documents, hardest of {self.hardest_of}), {self.size}, "
            f"seed {self.seed}"
        )

    def material(self, documents: SplitDocuments, number: int, position: int) -> str | None:
        found = self.sentences_of(documents, number)
        index = next((index for index, one in enumerate(found) if one.position == position), None)
        if index is None or not self.counts(found[index], documents.tokens):
            return None
        rng = random.Random(f"{self.seed}:{documents.doc_ids[number]}:{position}")
        truth = found[index].in_line
        wrong = self._same_document(found, index, documents.tokens, rng)
        if wrong is not None:
            # What the document says itself may come next there, so it is no candidate of another document.
            said = {one.in_line for one in found}
            wrong = self._other_documents(documents, number, truth, wrong, said, rng)
        if wrong is None:
            return None
        right = rng.randrange(self.num_candidates)
        rng.shuffle(wrong)
        return Choice(candidates=(*wrong[:right], truth, *wrong[right:]), right=right).to_text()

    def context_ids(self, task: Task, tokens: TokenBytes) -> TokenIds:
        return task.context_ids + self.question_ids(choice_of(task), tokens)

    def question_ids(self, choice: Choice, tokens: TokenBytes) -> TokenIds:
        """Return what follows the text: the candidates, and in a chat the words around them."""
        before, after = ASK if self.is_chat else ("", "\n")
        return tuple(
            token
            for part in (before, *question_parts(choice.candidates), after)
            for token in tokens.encode_plain(part)
        )

    def truth(self, task: Task) -> tuple[bytes, ...]:
        return (choice_of(task).letter.encode(),)

    def is_right(self, prediction: bytes, task: Task) -> bool:
        return choice_letter(prediction.decode(errors="replace")) == choice_of(task).letter

    def _same_document(
        self, found: list[Sentence], index: int, tokens: TokenBytes, rng: random.Random
    ) -> list[str] | None:
        """Draw the wrong candidates from the document itself. None: it has too few."""
        wanted = self.num_candidates - 1 - self.num_from_others
        others = found[index + 1 :] if self.same_document == "behind" else found[:index] + found[index + 1 :]
        texts = dict.fromkeys(one.in_line for one in others if self.counts(one, tokens))
        texts.pop(found[index].in_line, None)
        return rng.sample(list(texts), wanted) if len(texts) >= wanted else None

    def _other_documents(
        self,
        documents: SplitDocuments,
        number: int,
        truth: str,
        wrong: list[str],
        said: set[str],
        rng: random.Random,
    ) -> list[str] | None:
        """Add the wrong candidates from other documents. None: there are too few."""
        words = set(truth.split())
        for _ in range(self.num_from_others):
            drawn = list[str]()
            for _ in range(NUM_TRIES * self.hardest_of):
                if len(drawn) == self.hardest_of:
                    break
                text = self._drawn(documents, number, rng)
                if text is not None and text not in said and text not in wrong:
                    drawn.append(text)
            if not drawn:
                return None
            wrong = [*wrong, max(drawn, key=lambda text: _overlap(words, set(text.split())))]
        return wrong

    def _drawn(self, documents: SplitDocuments, number: int, rng: random.Random) -> str | None:
        """Draw a document, and a sentence of it. None: it is the same document or the sentence is no good."""
        other = rng.randrange(len(documents))
        found = [] if other == number else self.sentences_of(documents, other)
        one = rng.choice(found) if found else None
        return one.in_line if one is not None and self.counts(one, documents.tokens) else None


def question_parts(candidates: Sequence[str]) -> list[str]:
    """Return what is written about the candidates, in parts that tokenizers do not merge.

    >>> question_parts(["We ran.", "It rained."])
    ['\\nA:', ' We ran.', '\\nB:', ' It rained.']
    """
    pairs = zip(LETTERS, candidates, strict=False)
    return [part for letter, text in pairs for part in (f"\n{letter}:", f" {text}")]


def choice_of(task: Task) -> Choice:
    """Return the task's candidates. Raises ValueError if the task has none."""
    return Choice.from_text(material_of(task, "NextSentenceObjective"))


def _overlap(words: set[str], others: set[str]) -> float:
    """Return the share of words that two sentences have in common (Jaccard)."""
    return len(words & others) / len(words | others)
