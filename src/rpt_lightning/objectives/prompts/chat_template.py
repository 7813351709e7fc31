"""A model's own chat template: the text around a message, and whether it has already opened the thought."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rpt_lightning.objectives.prompts.paper_wordings import CONTEXT_SLOT

# The date that the templates of Llama 3.1 and later write if they are not given one.
TEMPLATE_DATE = datetime(2024, 7, 26)
# Arguments that the template always receives.
_RESERVED = {
    *(
        "messages",
        "conversation",
        "add_generation_prompt",
        "tokenize",
        "continue_final_message",
        "return_dict",
        "return_tensors",
    ),
    "strftime_now",
}


class ChatTemplate:
    """The chat template of a tokenizer, with arguments of its own such as ``enable_thinking``.

    Raises ValueError if the tokenizer has no chat template, or if the template does not know an argument.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None, *, prompt: str
    ) -> None:
        self.name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise ValueError(
                f"tokenizer {self.name!r} has no chat template, which {prompt} needs; "
                "use ContinuationPrompt or a chat model"
            )
        self._tokenizer = tokenizer
        self._arguments = dict(arguments or {})
        for name in self._arguments:
            if name in _RESERVED:
                raise ValueError(f"template_args: {name} is set by {prompt} itself; leave it out")
            # A template ignores arguments that it does not know, and would ignore a mistyped name too.
            if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
                raise ValueError(
                    f"template_args: the chat template of {self.name!r} does not know {name!r}; "
                    "correct the name or leave it out"
                )

    def around_question(
        self, wording: str, think_open: str | None, think_close: str | None
    ) -> tuple[str, str, bool]:
        """Render the text before and after the wording's slot, with the wording as the user's turn.

        The text after the slot ends where the model starts to write. The third value says whether the thought
        still has to be opened.
        """
        message = {"role": "user", "content": wording}
        before, after = self._render([message], add_generation_prompt=True)
        if think_open is None or think_close is None:
            return before, after, False
        _, turn = self._render([message], add_generation_prompt=False)
        start = len(turn) if after.startswith(turn) and len(turn) < len(after) else 0
        opening, is_missing = open_thought(after[start:], think_open, think_close, template=self.name)
        return before, after[:start] + opening, is_missing

    def behind_answer(self) -> str:
        """Return the text that follows the assistant's turn."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": CONTEXT_SLOT}]
        return self._render(messages, add_generation_prompt=False)[1]

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> tuple[str, str]:
        """Return the text that the chat template puts before and after the slot."""
        rendered, again = (
            self._rendered(messages, add_generation_prompt=add_generation_prompt) for _ in range(2)
        )
        if rendered != again:
            raise ValueError(
                f"the chat template of {self.name!r} gives a different text in every call; "
                "remove what is random in it"
            )
        before, *after = rendered.split(CONTEXT_SLOT)
        if len(after) != 1:
            raise ValueError(
                f"the chat template of {self.name!r} shows a message {len(after)} times instead of once; "
                "use ContinuationPrompt"
            )
        return before, after[0]

    def _rendered(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Render the template with a fixed date, so that a resumed run gives the same prompts as before.

        A template that writes the date receives `TEMPLATE_DATE`.
        """
        given = {
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": TEMPLATE_DATE.strftime,
            **self._arguments,
        }
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **given))
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise ValueError(
                f"the chat template of {self.name!r} cannot be used ({type(error).__name__}: {error}); "
                "correct chat_template.jinja, or chat_template in tokenizer_config.json, "
                "or use ContinuationPrompt"
            ) from error


def open_thought(opening: str, think_open: str, think_close: str, *, template: str = "") -> tuple[str, bool]:
    r"""Remove a closed thought from the beginning of the model's turn.

    Also returns whether the thought still has to be opened after it. Some templates leave the thought out.
    Others open it (R1), begin it, or close it at once if thinking is off. They close it with an empty pair of
    markers (Qwen 3.5's small models) or with the closing one alone (DeepSeek V3.1). Raises ValueError if text
    follows a closed thought.

    >>> open_thought("<a>\n", "<t>", "</t>"), open_thought("<a>\n<t>\n", "<t>", "</t>")
    (('<a>\n', True), ('<a>\n<t>\n', False))
    >>> open_thought("<a>\n<t>\n\n</t>\n\n", "<t>", "</t>")
    ('<a>\n', True)
    """
    opened, closed = opening.rfind(think_open), opening.rfind(think_close)
    if closed <= opened:  # also if there is neither
        return opening, opened < 0
    if opening[closed + len(think_close) :].strip():
        raise ValueError(
            f"the chat template of {template!r} closes the thought and continues after it, so no thought can "
            "be requested; turn thinking on with template_args, such as enable_thinking: true, "
            "or set think_open and think_close to null"
        )
    begin = opening.rfind(think_open, 0, closed)
    return opening[: closed if begin < 0 or think_close in opening[begin:closed] else begin], True
