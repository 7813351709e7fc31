r"""How the policy is prompted: a template around the context's token ids, and the form of an answer.

The context's ids stay untouched. The context is never decoded and tokenised again, since that would move
token boundaries, and the reward depends on them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rpt_lightning.objectives.box import BOX_CLOSE, BOX_OPEN
from rpt_lightning.objectives.prompts.chat_template import ChatTemplate
from rpt_lightning.objectives.prompts.end_tokens import end_ids
from rpt_lightning.objectives.prompts.paper_wordings import CONTEXT_SLOT, NOTE_SLOT, WORDINGS, with_note
from rpt_lightning.pretrained.token_bytes import TokenBytes, start_ids
from rpt_lightning.types import TokenIds

FILLER = "."


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundPrompt:
    r"""A prompt template in the token ids of one tokenizer.

    The prompt is ``prefix_ids + context + suffix_ids``. The completion is ``thought + answer_open_ids +
    answer + answer_close_ids``. ``answer_open_ids`` are the closing thought marker and ``\boxed{``.
    ``answer_close_ids`` are the closing brace and the token that ends the turn. ``think_close`` is None if
    the policy is not asked for a marked thought. ``filler_id`` is a token without meaning, a full stop.
    ``close_ids`` are the closing thought marker alone.
    """

    prefix_ids: TokenIds
    suffix_ids: TokenIds
    answer_open_ids: TokenIds
    answer_close_ids: TokenIds
    stop_token_ids: TokenIds
    think_close: bytes | None
    filler_id: int
    close_ids: TokenIds

    @property
    def num_overhead_tokens(self) -> int:
        """Number of tokens that the template adds to every context."""
        return len(self.prefix_ids) + len(self.suffix_ids)

    def prompt_ids(self, context_ids: TokenIds) -> TokenIds:
        """Return the prompt, with the thought already opened."""
        return self.prefix_ids + tuple(context_ids) + self.suffix_ids

    def answer_prefix_ids(self, thought_ids: TokenIds) -> TokenIds:
        r"""Return the tokens that force a thought when they follow the prompt.

        The policy continues inside ``\boxed{``.
        """
        return tuple(thought_ids) + self.answer_open_ids

    def completion_ids(self, thought_ids: TokenIds, answer_ids: TokenIds) -> TokenIds:
        """Return a whole completion as the policy should write it, including its stop token."""
        return self.answer_prefix_ids(thought_ids) + tuple(answer_ids) + self.answer_close_ids


class PromptTemplate(ABC):
    """How the policy is prompted."""

    @abstractmethod
    def bind(self, tokenizer: PreTrainedTokenizerBase) -> BoundPrompt:
        """Bind to a tokenizer. Raises ValueError if it cannot express the template."""

    def bind_with_notes(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], BoundPrompt]:
        """Return a function from a note, such as a budget of tokens, to the prompt that states it.

        All these prompts have the form of answer of ``bind``. Raises ValueError if the template has no place
        for a note.
        """
        raise ValueError(
            f"{type(self).__name__} has no place for a note, so it cannot state a budget of tokens; define "
            "its bind_with_notes, take ContinuationPrompt or ChatPrompt, or give "
            "--rollout.thought_budget.wording null"
        )


class ContinuationPrompt(PromptTemplate):
    """The unchanged context, then the thought.

    This is the form that a base model or a small model was pre-trained on. If a tokenizer begins every text
    with a special token (Llama 3), the prompt does too. The thought markers may be tokens of the tokenizer or
    plain text.

    Args:
        think_open: Opens the thought. null, together with think_close, asks for no marked thought.
        think_close: Closes the thought.
    """

    def __init__(self, think_open: str | None = "<think>", think_close: str | None = "</think>") -> None:
        _check_markers(think_open, think_close)
        self.think_open = think_open
        self.think_close = think_close

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> BoundPrompt:
        token_bytes = TokenBytes(tokenizer)
        return _bound(
            tokenizer,
            token_bytes,
            prefix_ids=start_ids(tokenizer),
            suffix_ids=_marker_ids(tokenizer, token_bytes, self.think_open),
            think_close=self.think_close,
            stop_token_ids=end_ids(tokenizer, token_bytes),
        )

    def bind_with_notes(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], BoundPrompt]:
        """Put notes on a line of their own between the context and the thought."""
        bound, token_bytes = self.bind(tokenizer), TokenBytes(tokenizer)
        return lambda note: replace(
            bound, suffix_ids=token_bytes.encode_plain(f"\n\n{note}\n") + bound.suffix_ids
        )


class ChatPrompt(PromptTemplate):
    r"""The paper's question inside the model's own chat template.

    The wordings are ``v0`` (main runs) to ``v6`` of the paper's Table 10. The thought is opened after the
    template's generation prompt unless the template does so itself (the R1 distillations do). If the template
    closes the thought again at once, that closed thought is removed. The turn ends with the token that the
    template puts after an assistant's message.

    Args:
        version: v0 to v6.
        think_open: Marker that opens the thought. null, here and for think_close, asks for no marked thought.
        think_close: Marker that closes the thought.
        template_args: Further arguments for the chat template, such as ``enable_thinking: true``.
    """

    def __init__(
        self,
        version: str = "v0",
        think_open: str | None = "<think>",
        think_close: str | None = "</think>",
        template_args: dict[str, Any] | None = None,
    ) -> None:
        if version not in WORDINGS:
            raise ValueError(f"version={version!r}: the prompt versions are {', '.join(WORDINGS)}")
        _check_markers(think_open, think_close)
        self.version = version
        self.think_open = think_open
        self.think_close = think_close
        self.template_args = template_args

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> BoundPrompt:
        template = ChatTemplate(tokenizer, self.template_args, prompt="ChatPrompt")
        return _chat(tokenizer, template, WORDINGS[self.version], self.think_open, self.think_close)

    def bind_with_notes(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], BoundPrompt]:
        """Put notes after the instruction and before the context."""
        template = ChatTemplate(tokenizer, self.template_args, prompt="ChatPrompt")
        wording = with_note(WORDINGS[self.version])
        return _chat_with_notes(tokenizer, template, wording, self.think_open, self.think_close)


class QuestionPrompt(PromptTemplate):
    """The context as the user's turn of the model's own chat template.

    It is for questions, which need no further instruction. The thought and the end of the turn are as in
    `ChatPrompt`. For a base model use `ContinuationPrompt`.

    Args:
        think_open: Marker that opens the thought. null, here and for think_close, asks for no marked thought.
        think_close: Marker that closes the thought.
        template_args: Further arguments for the chat template, such as ``enable_thinking: true``.
    """

    def __init__(
        self,
        think_open: str | None = "<think>",
        think_close: str | None = "</think>",
        template_args: dict[str, Any] | None = None,
    ) -> None:
        _check_markers(think_open, think_close)
        self.think_open = think_open
        self.think_close = think_close
        self.template_args = template_args

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> BoundPrompt:
        template = ChatTemplate(tokenizer, self.template_args, prompt="QuestionPrompt")
        return _chat(tokenizer, template, CONTEXT_SLOT, self.think_open, self.think_close)

    def bind_with_notes(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], BoundPrompt]:
        """Put notes after the question."""
        template = ChatTemplate(tokenizer, self.template_args, prompt="QuestionPrompt")
        wording = f"{CONTEXT_SLOT}\n\n{NOTE_SLOT}"
        return _chat_with_notes(tokenizer, template, wording, self.think_open, self.think_close)


def _chat(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    wording: str,
    think_open: str | None,
    think_close: str | None,
) -> BoundPrompt:
    """Build the prompt with the wording as the user's turn."""
    token_bytes = TokenBytes(tokenizer)
    before, after, opens = template.around_question(wording, think_open, think_close)
    opening_ids = _marker_ids(tokenizer, token_bytes, think_open) if opens else ()
    turn_end = [
        token_id
        for token_id in _template_ids(tokenizer, template.behind_answer())
        if token_bytes.is_special(token_id)
    ][:1]
    return _bound(
        tokenizer,
        token_bytes,
        prefix_ids=_template_ids(tokenizer, before),
        suffix_ids=_template_ids(tokenizer, after) + opening_ids,
        think_close=think_close,
        stop_token_ids=tuple(dict.fromkeys([*turn_end, *end_ids(tokenizer, token_bytes)])),
    )


def _chat_with_notes(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    wording: str,
    think_open: str | None,
    think_close: str | None,
) -> Callable[[str], BoundPrompt]:
    """Build the prompts whose wording has a slot for a note.

    The note becomes tokens together with the template's text around it, as in any other wording. Raises
    ValueError if the chat template does not show the slot once.
    """
    before, after, opens = template.around_question(wording, think_open, think_close)
    if (before + after).count(NOTE_SLOT) != 1:
        raise ValueError(
            f"the chat template of {template.name!r} shows a note {(before + after).count(NOTE_SLOT)} times "
            "instead of once; give --rollout.thought_budget.wording null, or use ContinuationPrompt"
        )
    bound = _chat(tokenizer, template, wording, think_open, think_close)
    opening_ids = _marker_ids(tokenizer, TokenBytes(tokenizer), think_open) if opens else ()
    return lambda note: replace(
        bound,
        prefix_ids=_template_ids(tokenizer, before.replace(NOTE_SLOT, note)),
        suffix_ids=_template_ids(tokenizer, after.replace(NOTE_SLOT, note)) + opening_ids,
    )


def _bound(
    tokenizer: PreTrainedTokenizerBase,
    token_bytes: TokenBytes,
    *,
    prefix_ids: TokenIds,
    suffix_ids: TokenIds,
    think_close: str | None,
    stop_token_ids: TokenIds,
) -> BoundPrompt:
    close_id = None if think_close is None else tokenizer.get_added_vocab().get(think_close)
    if close_id is None:
        # One string, so that the merges across the marker's end are the same as in ordinary text.
        answer_open_ids = token_bytes.encode_plain((think_close or "") + BOX_OPEN.decode())
    else:
        answer_open_ids = (close_id, *token_bytes.encode_plain(BOX_OPEN.decode()))
    return BoundPrompt(
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        answer_open_ids=answer_open_ids,
        answer_close_ids=(*token_bytes.encode_plain(BOX_CLOSE.decode()), stop_token_ids[0]),
        stop_token_ids=stop_token_ids,
        think_close=None if think_close is None else think_close.encode(),
        filler_id=token_bytes.encode_plain(FILLER)[0],
        close_ids=_marker_ids(tokenizer, token_bytes, think_close),
    )


def _check_markers(think_open: str | None, think_close: str | None) -> None:
    if think_open == "" or think_close == "":
        raise ValueError(
            f"think_open={think_open!r}, think_close={think_close!r}: a marker cannot be empty; "
            "use null for no marked thought"
        )
    if (think_open is None) != (think_close is None):
        raise ValueError(
            f"think_open={think_open!r}, think_close={think_close!r}: "
            "give both thought markers, or null for both"
        )


def _marker_ids(tokenizer: PreTrainedTokenizerBase, token_bytes: TokenBytes, marker: str | None) -> TokenIds:
    """Return one id if the tokenizer has the marker as a token (Qwen 3, R1), else the ids of its text."""
    if marker is None:
        return ()
    marker_id = tokenizer.get_added_vocab().get(marker)
    return (marker_id,) if marker_id is not None else token_bytes.encode_plain(marker)


def _template_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenIds:
    """Return the ids of the template's own text, in which the chat markers are tokens."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tuple(ids)
