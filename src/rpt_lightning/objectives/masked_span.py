r"""Masked span: find the text that a mark hides, given the text before and after it.

PretrainZero (arXiv:2512.03442): a span of a text is masked, the policy thinks and answers, and with ``y`` for
its answer and ``s`` for the span,

    r = 1[y = s]

Next-token reasoning sees only what comes before. Here an answer may also follow from what comes later.

It differs from PretrainZero in what lies around the formula. The policy answers in a box, and the task folder
says where spans begin (`rpt prepare`).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rpt_lightning.objectives.base import BoundObjective, Objective
from rpt_lightning.objectives.box import answerable_lengths
from rpt_lightning.objectives.prompts.template import ChatPrompt, PromptTemplate
from rpt_lightning.objectives.rewards.next_token import token_task
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Fields, Task, TokenIds, TrainSequence

SPACE = b" "
# Words in the alphabet of `_shape`. One joiner may stand between two parts of a word.
_WORD = "w+(?:jw+)*"
_JOINERS = "'\u2019-"
_INVISIBLE_JOINERS = "\u200c\u200d"  # inside words of Persian and Hindi


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanTask:
    """A given span of a shown text. All of the text around it is shown.

    ``span`` holds the bytes of the span's tokens, ``behind_ids`` the tokens behind it. The other fields are
    as in `TokenTask`.
    """

    task_id: str
    doc_id: str
    position: int
    context_ids: TokenIds
    span: tuple[bytes, ...]
    behind_ids: TokenIds
    fields: Fields = field(default_factory=dict, hash=False)
    rest_ids: TokenIds = ()
    budget: int | None = None

    @property
    def entropy(self) -> None:
        """No proxy has scored the place."""

    @property
    def answerable(self) -> bool:
        return True


class MaskedSpanObjective(Objective):
    """Find the text that a mark hides. The text before and after it is shown.

    An answer is right if its bytes are exactly those of the hidden text. The space before a span is not
    hidden, so it does not belong to the answer. Without a thought, the policy writes the hidden text into a
    box that is already open, and closes it.

    Args:
        prompt: How the policy is prompted. None adds nothing to the text and ``question``.
        unit: What a span consists of: "word" (letters, digits, and single hyphens or apostrophes between
            them), or "token". Words need spaces between them. Use tokens for other scripts.
        max_length: Largest number of words or tokens of a span. Each span's own length is drawn from 1 to
            this. It is shorter if the text has fewer, for example before a full stop.
        max_tokens: Largest number of tokens of a span, together with the token after it, which shows where it
            ends. The answer_reach of `rpt prepare` must be at least as large.
        num_behind: Number of tokens after the span that are shown, if the text has that many.
        mark: Text that replaces the span. Documents that contain it themselves are not used.
        question: Text after the shown text. Chat models need one, such as "Which text does ____ hide?".
        seed: Seed from which the lengths are drawn.
    """

    def __init__(
        self,
        prompt: PromptTemplate | None = None,
        unit: Literal["word", "token"] = "word",
        max_length: int = 1,
        max_tokens: int = 8,
        num_behind: int = 64,
        mark: str = "____",
        question: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(prompt)
        flag = "--rollout.objective"
        if isinstance(prompt, ChatPrompt):
            raise ValueError(
                f"{type(self).__name__} cannot use ChatPrompt, which asks for the next token; "
                f"give the prompt ContinuationPrompt, or QuestionPrompt with {flag}.question"
            )
        for name, value in [("max_length", max_length), ("num_behind", num_behind)]:
            if value < 1:
                raise ValueError(f"{flag}.{name} {value}: must be at least 1")
        if max_tokens <= max_length:
            raise ValueError(
                f"{flag}.max_tokens {max_tokens}: a span of {max_length} {unit}s has, together with the "
                f"token after it, at least {max_length + 1} tokens; raise it, or lower {flag}.max_length"
            )
        if not mark.strip():
            raise ValueError(f"{flag}.mark {mark!r}: it must be visible; give some text, such as ____")
        self.unit = unit
        self.max_length = max_length
        self.max_tokens = max_tokens
        self.num_behind = num_behind
        self.mark = mark
        self.question = question
        self.seed = seed
        self.num_truth_tokens = max_tokens
        self.num_following_tokens = max_tokens + num_behind
        # A token has at least one byte.
        self.num_added_tokens = num_behind + len(f" {mark}{question}".encode())
        self._last_document: tuple[Sequence[bytes], bool] | None = None

    @property
    def places(self) -> str:
        return (
            f"masked spans of 1 to {self.max_length} {self.unit}s "
            f"(max_tokens {self.max_tokens}, seed {self.seed})"
        )

    # Where tasks lie

    def may_ask(self, tokens: Sequence[bytes], position: int) -> bool:
        if self.unit == "word" and _is_inside_word(tokens, position):
            return False
        following = tokens[position : position + self.max_tokens]
        return self.span_length(following, position) > 0 and not self._holds_mark(tokens)

    def span_length(self, following: Sequence[bytes], position: int) -> int:
        """Return the number of tokens of the span at a position. 0: no span may begin there.

        Args:
            following: The bytes of up to ``max_tokens`` tokens from the position on.
            position: The position in the document.
        """
        following = following[: self.max_tokens]
        lengths = range(self._drawn_length(following, position), 0, -1)
        return next((number for length in lengths if (number := self._num_tokens(following, length))), 0)

    def spans(self, shown: Sequence[bytes]) -> dict[bytes, list[tuple[int, int]]]:
        """Return the spans of a shown text that could be hidden, of any length up to ``max_length``.

        Args:
            shown: The bytes of the text's tokens.

        Returns:
            For each text that could be hidden, where it stands: first token and number of tokens. There is
            text before and behind each span.
        """
        found: dict[bytes, list[tuple[int, int]]] = {}
        for first in range(1, len(shown)):
            if self.unit == "word" and _is_inside_word(shown, first):
                continue
            following = shown[first : first + self.max_tokens]
            for length in range(1, self.max_length + 1):
                number = self._num_tokens(following, length)
                if number:
                    hidden = b"".join(following[:number]).removeprefix(SPACE)
                    found.setdefault(hidden, []).append((first, number))
        return found

    def _num_tokens(self, following: Sequence[bytes], length: int) -> int:
        """Return the number of tokens of a span of exactly ``length`` words or tokens. 0: there is none."""
        # The next token shows where a word ends, and it is what "behind" means.
        number = _word_end(following, length) if self.unit == "word" else _token_end(following, length)
        return number if number and _can_be_answered(b"".join(following[:number])) else 0

    def _drawn_length(self, following: Sequence[bytes], position: int) -> int:
        """Draw the number of words or tokens. It depends on the text from the position on and on the seed."""
        key = f"{self.seed}:{position}:".encode() + b"".join(following)
        return 1 + int.from_bytes(hashlib.sha256(key).digest()[:6], "little") * self.max_length // 2**48

    def _holds_mark(self, tokens: Sequence[bytes]) -> bool:
        # All positions of a document are asked one after the other.
        if self._last_document is None or self._last_document[0] is not tokens:
            self._last_document = tokens, self.mark.encode() in b"".join(tokens)
        return self._last_document[1]

    # What the policy sees

    def context_ids(self, task: Task, tokens: TokenBytes) -> TokenIds:
        span = self._span(task)
        space = " " if span[0].startswith(SPACE) else ""
        if isinstance(task, SpanTask):
            behind = task.behind_ids
        else:
            behind = token_task(task).following_ids[len(span) :][: self.num_behind]
        return (
            task.context_ids
            + tokens.encode_plain(space + self.mark)
            + behind
            + (tokens.encode_plain(self.question) if self.question else ())
        )

    # What counts as right

    def truth(self, task: Task) -> tuple[bytes, ...]:
        first, *rest = self._span(task)
        return tuple(piece for piece in (first.removeprefix(SPACE), *rest) if piece)

    def direct_sequence(self, task: Task, bound: BoundObjective) -> TrainSequence:
        """Return the prompt, an open box, the hidden text and the brace that closes the box.

        Without the brace, a text that begins with the hidden one would count as right.
        """
        open_box = super().direct_sequence(task, bound)
        closing_ids = bound.prompt.answer_close_ids[:-1]  # the last one ends the turn
        return TrainSequence(prompt_ids=open_box.prompt_ids, target_ids=open_box.target_ids + closing_ids)

    def _span(self, task: Task) -> tuple[bytes, ...]:
        """Return the bytes of the span's tokens. Raises ValueError if no span begins at the task."""
        if isinstance(task, SpanTask):
            return task.span
        one = token_task(task)
        length = self.span_length(one.continuation, one.position)
        if not length:
            raise ValueError(
                f"task {task.task_id!r}: no span begins there ({self.places}); prepare the task folder with "
                f"--objective {type(self).__name__} and the same settings"
            )
        return one.continuation[:length]


def _can_be_answered(span: bytes) -> bool:
    """Whether something visible would be hidden, and a box can hold it.

    A span that begins or ends inside a character cannot be asked about: the text around it would show a part
    of that character.
    """
    try:
        text = span.decode()
    except UnicodeDecodeError:
        return False
    hidden = text.removeprefix(" ")
    return bool(hidden.strip()) and bool(answerable_lengths([hidden.encode()]))


def _token_end(following: Sequence[bytes], length: int) -> int:
    """Return ``length`` if there are that many tokens and one more after them, else 0."""
    return length if len(following) > length else 0


def _word_end(following: Sequence[bytes], num_words: int) -> int:
    """Return the number of tokens of exactly ``num_words`` words, or 0.

    There is one space between the words, and there may be one before the first. The text after them must
    show that the last word ends, and a token must begin there.

    >>> _word_end([b" the", b" su", b"m", b" of"], 2), _word_end([b" the", b" su", b"m"], 2)
    (3, 0)
    """
    text = _whole_characters(b"".join(following))
    # After the words: a character that is in no word, or a joiner that joins nothing.
    pattern = rf" ?{_WORD}(?: {_WORD}){{{num_words - 1}}}(?=[ .]|j[^w])"
    match = re.match(pattern, _shape(text))
    if match is None:
        return 0
    num_bytes = len(text[: match.end()].encode())
    for num_tokens in range(1, len(following)):
        num_bytes -= len(following[num_tokens - 1])
        if num_bytes <= 0:
            return num_tokens if num_bytes == 0 else 0
    return 0


def _is_inside_word(tokens: Sequence[bytes], position: int) -> bool:
    """Whether the token at a position continues a word, or what may be one.

    The space before a word belongs to it. If that space is a token of its own, the word begins there: whether
    it is one depends on the word, so to show it would tell something about the word.
    """
    if tokens[position].startswith(SPACE):
        return False
    # A character has at most 4 bytes, so 4 tokens hold at least one.
    before = _shape(b"".join(tokens[max(0, position - 4) : position]).decode(errors="ignore")[-1:])
    return before in ("w", "j", " ")


def _shape(text: str) -> str:
    """Return the kind of each character: w (in words), j (joins two parts of a word), space, or full stop.

    >>> _shape("Let's go, 2x!")
    'wwwjw ww. ww.'
    """
    return "".join(_kind(character) for character in text)


def _kind(character: str) -> str:
    if character in _JOINERS:
        return "j"
    if (
        character.isalnum()
        or character in _INVISIBLE_JOINERS
        or character == "_"
        or unicodedata.category(character).startswith("M")  # accents, and the vowels of many scripts
    ):
        return "w"
    return " " if character == " " else "."


def _whole_characters(text: bytes) -> str:
    """Decode the text up to its first incomplete or wrong character."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start].decode()
