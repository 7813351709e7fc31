"""Cold-start traces: a short thought, and an answer that the model itself would give.

The thought names the model's own most likely next tokens at a position. The answer is one of them, drawn by
its probability. Nothing in this file takes the true continuation as input, because a policy that is taught
the format must not be taught the answers at the same time.
"""

from __future__ import annotations

import numpy as np

from rpt_lightning.data.modules.random_draw import uniform
from rpt_lightning.objectives.box import answerable_lengths
from rpt_lightning.objectives.prompts.template import BoundPrompt
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import TokenIds, TrainSequence

SEPARATOR = "|"


class TraceWriter:
    """Write the trace of a position.

    Args:
        prompt: Prompt template that the policy will be used with.
        token_bytes: Bytes of the policy's tokens.
        num_candidates: Number of the model's most likely next tokens that the thought names.
        only_answerable: Leave out candidates that the box parser would not return, such as a single brace.
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
        """Write the trace. Returns None if no candidate can be an answer.

        Candidates come in falling order of probability. The position's identity seeds the draw.
        """
        think_close = self.prompt.think_close
        usable = [
            (token, prob)
            for token, prob in zip(candidate_ids, candidate_probs, strict=True)
            # Folders from older versions of `rpt prepare` hold vocabulary rows that are not tokens.
            if token in self.token_bytes
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
