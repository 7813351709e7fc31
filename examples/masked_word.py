"""An example of your own objective: which word is hidden in the middle of a text?

The policy sees the text before the word, a gap, and the text after it. It is right if its box holds the
word. This file is all that you need. Every command accepts the class by its import path:

    export PYTHONPATH=examples
    rpt prepare --config configs/prepare/debug.yaml --objective masked_word.MaskedWord \
        --output_dir tasks/words
    rpt fit --config configs/debug.yaml --rollout.objective masked_word.MaskedWord \
        --data.task_dir tasks/words --trainer.default_root_dir runs/words
"""

from __future__ import annotations

from collections.abc import Sequence

import rpt_lightning as rpt
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Task, TokenIds

GAP = " ____"
MAX_TOKENS = 8  # of a word


def word_length(tokens: Sequence[bytes]) -> int:
    """Return the number of tokens in the word at the beginning (a space, then letters), or 0 without one."""
    text = b""
    for number, token in enumerate(tokens):
        is_end = not token.isalpha() if number else False
        if is_end:
            return number if text[1:].isalpha() else 0
        text += token
        if not text.startswith(b" "):
            return 0
    return 0


class MaskedWord(rpt.Objective):
    """Find the hidden word.

    Args:
        prompt: How the policy is prompted. None adds nothing to the text.
        num_behind: Number of tokens after the word that the policy sees.
    """

    def __init__(self, prompt: rpt.PromptTemplate | None = None, num_behind: int = 24) -> None:
        super().__init__(prompt)
        self.num_behind = num_behind
        self.num_following_tokens = MAX_TOKENS + num_behind
        self.num_added_tokens = len(GAP) + num_behind

    def may_ask(self, tokens: Sequence[bytes], position: int) -> bool:
        return word_length(tokens[position : position + MAX_TOKENS]) > 0

    def context_ids(self, task: Task, tokens: TokenBytes) -> TokenIds:
        behind = len(self.truth(task))
        text_behind = task.following_ids[behind : behind + self.num_behind]
        return task.context_ids + tokens.encode_plain(GAP) + text_behind

    def truth(self, task: Task) -> tuple[bytes, ...]:
        return task.continuation[: word_length(task.continuation)]

    def is_right(self, prediction: bytes, task: Task) -> bool:
        return prediction.strip() == b"".join(self.truth(task)).strip()
