"""Cold-start traces: a short thought and an answer that the model itself would give.

The thought names the model's own most likely next tokens at a position; the answer is one of them, drawn by its probability. The true continuation is
not an input of anything in this file: a policy that is taught the format must not be taught the answers at the same time.
"""

from __future__ import annotations

import numpy as np

from rpt_lightning.data.draw import uniform
from rpt_lightning.tasks.answer import answerable_lengths
from rpt_lightning.tasks.prompt import BoundPrompt
from rpt_lightning.tasks.token_bytes import TokenBytes
from rpt_lightning.types import TokenIds, TrainSequence

SEPARATOR = "|"


class TraceWriter:
    """Writes the trace of a position.

    Args:
        prompt: The template that the policy will be asked with.
        token_bytes: Bytes of the policy's tokens.
        num_candidates: How many of the model's most likely next tokens the thought names.
        only_answerable: Leave out candidates that the box parser would not give back, such as a single brace.
        seed: Seed of the drawn answers.
    """

    def __init__(
        self,
        prompt: BoundPrompt,
        token_bytes: TokenBytes,
        *,
        num_candidates: int,
        only_answerable: bool,
        seed: int,
    ) -> None:
        self.prompt = prompt
        self.token_bytes = token_bytes
        self.num_candidates = num_candidates
        self.only_answerable = only_answerable
        self.seed = seed
        self.separator_ids = token_bytes.encode_plain(SEPARATOR)

    def write(
        self, task_id: str, context_ids: TokenIds, candidate_ids: TokenIds, candidate_probs: tuple[float, ...]
    ) -> TrainSequence | None:
        """The trace, or None where no candidate can be an answer. Candidates come most likely first; the position's identity seeds the draw."""
        think_close = self.prompt.think_close
        usable = [
            (token, prob)
            for token, prob in zip(candidate_ids, candidate_probs, strict=True)
            if token
            in self.token_bytes  # folders of before `rpt prepare` left out rows of the proxy's vocabulary that are no token
            and not self.token_bytes.is_special(token)
            and (
                not self.only_answerable
                or answerable_lengths([self.token_bytes[token]], think_close=think_close)
            )
        ][: self.num_candidates]
        if not usable:
            return None
        thought_ids: list[int] = []
        for place, (token, _) in enumerate(usable):
            thought_ids += [*(self.separator_ids if place else ()), token]
        weights = np.cumsum([prob for _, prob in usable])
        answer, _ = usable[
            int(np.searchsorted(weights, uniform(self.seed, task_id) * weights[-1], side="right"))
        ]
        return TrainSequence(
            prompt_ids=self.prompt.prompt_ids(context_ids),
            target_ids=self.prompt.completion_ids(tuple(thought_ids), (answer,)),
        )
