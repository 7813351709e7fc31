"""What the objectives about whole sentences have in common: where they ask, and which sentences they use."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.box import BOX_CLOSE, BOX_OPEN, THINK_CLOSE, extract_prediction
from rpt_lightning.objectives.prompts.template import ChatPrompt, PromptTemplate, QuestionPrompt
from rpt_lightning.objectives.sentences import Sentence, sentences
from rpt_lightning.objectives.split_documents import CACHED_DOCUMENTS, SplitDocuments
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Task, TokenTask

MIN_WORDS, MAX_TOKENS = 3, 64


class AboutSentences(Objective):
    """An objective that asks at the first token of a sentence.

    A sentence counts if it has ``min_words`` words and at most ``max_tokens`` tokens, and fits into a box.
    The sentence at which a truncated document breaks off does not count.

    What is asked is put behind the context. So all tasks of a document begin alike, and share that beginning.
    """

    has_material = True

    def __init__(self, prompt: PromptTemplate | None, *, max_tokens: int, min_words: int) -> None:
        name = type(self).__name__
        if isinstance(prompt, ChatPrompt):
            raise ValueError(
                f"{name} cannot use ChatPrompt, which asks for the next token; "
                "give the prompt QuestionPrompt (chat models) or ContinuationPrompt"
            )
        for flag, value in (("max_tokens", max_tokens), ("min_words", min_words)):
            if value < 1:
                raise ValueError(f"{name}: {flag}={value}: must be at least 1")
        super().__init__(prompt)
        self.max_tokens = max_tokens
        self.min_words = min_words
        self._asked: tuple[Sequence[bytes], set[int]] | None = None
        self._documents: SplitDocuments | None = None
        self._found: dict[int, list[Sentence]] = {}

    @property
    def is_chat(self) -> bool:
        """Whether a chat model is told in words what is asked."""
        return isinstance(self.prompt, QuestionPrompt)

    @property
    def size(self) -> str:
        """The length of the sentences, in words for ``places``."""
        return f"sentences of {self.min_words} words to {self.max_tokens} tokens"

    def may_ask(self, tokens: Sequence[bytes], position: int) -> bool:
        # The positions of a document come one after the other.
        if self._asked is None or self._asked[0] is not tokens:
            self._asked = tokens, {one.position for one in sentences(tokens) if self._is_usable(one)}
        return position in self._asked[1]

    def is_answerable(self, tokens: Sequence[bytes], position: int, *, reach: int) -> bool:
        return True  # what does not fit into a box is no task

    def sentences_of(self, documents: SplitDocuments, number: int) -> list[Sentence]:
        """Return all sentences of a document, in order."""
        if self._documents is not documents or len(self._found) == CACHED_DOCUMENTS:
            self._documents, self._found = documents, {}
        if number not in self._found:
            found = sentences(documents.pieces(number))
            is_part = bool(found) and found[-1].is_last and documents.is_cut[number]
            self._found[number] = found[:-1] if is_part else found
        return self._found[number]

    def counts(self, sentence: Sentence, tokens: TokenBytes) -> bool:
        """Whether a sentence is of the right size and fits into a box."""
        return self._is_usable(sentence) and longest_form(sentence.text, tokens) <= self.max_tokens

    def _is_usable(self, sentence: Sentence) -> bool:
        boxed = THINK_CLOSE + BOX_OPEN + sentence.text.encode() + BOX_CLOSE
        return len(sentence.words) >= self.min_words and extract_prediction(boxed) == sentence.text.encode()


@lru_cache(1 << 16)
def longest_form(text: str, tokens: TokenBytes) -> int:
    """Return the most tokens that a sentence has: as it stands, without space around it, or in one line."""
    forms = (text, text.strip(), " " + " ".join(text.split()))
    return max(len(tokens.encode_plain(form)) for form in forms)


def material_of(task: Task, name: str) -> str:
    """Return what ``rpt prepare`` stored with the task. Raises ValueError if it is not a task of ``name``."""
    if not isinstance(task, TokenTask) or not task.material:
        raise ValueError(
            f"task {task.task_id!r} was not prepared for {name}; "
            f"prepare a folder with rpt prepare --objective {name}"
        )
    return task.material
