"""Worked examples: a document up to an answer that can be worked out, a thought, and the answer in a box.

Some examples think and the others guess at once (arXiv:2510.11495 mixes the two). The share that thinks
determines what reinforcement then finds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rpt_lightning.data.modules.random_draw import uniform
from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.prompts.template import BoundPrompt
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Document, Mark, TokenIds, TokenTask, TrainSequence

DEPTH = "depth"  # the field with the number of successive steps in a mark's thought


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the curriculum.

    Args:
        steps: Number of optimizer steps that the phase lasts. The last phase always lasts to the end.
        p_cot: Fraction of the examples that think. The others have an empty thought and the true answer.
        min_depth: Examples of smaller depth never think.
        max_depth: Examples of greater depth never think. null sets no limit.
        guesses: Whether to include examples that do not think.
        text: Whether to train on the documents themselves as well.
    """

    steps: int = 1
    p_cot: float = 1.0
    min_depth: int = 0
    max_depth: int | None = None
    guesses: bool = True
    text: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"phases: steps={self.steps}: a phase lasts at least 1 step")
        if not 0 <= self.p_cot <= 1:
            raise ValueError(f"phases: p_cot={self.p_cot}: give a share from 0 to 1")
        if not (self.p_cot or self.guesses or self.text):
            raise ValueError(
                "phases: p_cot=0, guesses=False, text=False: nothing would be trained; set one of them"
            )

    def may_think(self, mark: Mark) -> bool:
        """Whether the curriculum allows an example of this mark to think."""
        depth = mark.fields.get(DEPTH, self.min_depth)
        assert not isinstance(depth, str)
        return (
            mark.thought is not None
            and self.min_depth <= depth
            and (self.max_depth is None or depth <= self.max_depth)
        )


class ExampleWriter:
    """Write the worked examples of documents.

    Args:
        prompt: Prompt template that the policy will be used with.
        token_bytes: Bytes of the policy's tokens.
        phases: The curriculum.
        seed: Seed of the choice of examples that think.
        objective: Objective that defines the examples, with ``prompt``. With None, an example shows the text
            before the marked text.
    """

    def __init__(
        self,
        prompt: BoundPrompt,
        token_bytes: TokenBytes,
        phases: Sequence[Phase],
        *,
        seed: int,
        objective: BoundObjective | None = None,
    ) -> None:
        self.objective = objective
        self.prompt = prompt
        self.token_bytes = token_bytes
        self.phases = phases
        self.seed = seed

    def phase(self, step: int) -> Phase:
        """Return the phase of a step, counted from 0."""
        for phase in self.phases[:-1]:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    def write(self, document: Document, *, step: int) -> list[TrainSequence]:
        """Write the examples of a document's marks that belong to the phase of ``step``.

        Raises ValueError if a mark does not begin and end at token boundaries.
        """
        phase, examples = self.phase(step), []
        for number, mark in enumerate(document.marks):
            thinks = (
                phase.may_think(mark)
                and uniform(self.seed, f"{document.doc_id}:{number}:{step}") < phase.p_cot
            )
            if thinks or phase.guesses:
                examples.append(self._example(document, mark, thinks=thinks))
        return examples

    def _example(self, document: Document, mark: Mark, *, thinks: bool) -> TrainSequence:
        thought = self.token_bytes.encode_plain(mark.thought) if thinks and mark.thought is not None else ()
        before, marked, behind = self._split(document.text, mark)
        if self.objective is None:
            prompt_ids, answer = self.prompt.prompt_ids(before), marked
        else:
            prompt_ids, answer = self._asked(self.objective, document, before, marked, behind)
        return TrainSequence(prompt_ids=prompt_ids, target_ids=self.prompt.completion_ids(thought, answer))

    def _asked(
        self,
        bound: BoundObjective,
        document: Document,
        before: TokenIds,
        marked: TokenIds,
        behind: TokenIds,
    ) -> tuple[TokenIds, TokenIds]:
        """Return what the objective shows and what it asks for at a mark.

        Raises ValueError if it does not ask for the mark's text.
        """
        position, following_ids = len(before), marked + behind
        pieces = [self.token_bytes[token] for token in before + following_ids]
        task = TokenTask(
            task_id=f"{document.doc_id}:{position}",
            doc_id=document.doc_id,
            position=position,
            context_ids=before,
            continuation_ids=following_ids,
            continuation=tuple(pieces[position:]),
            entropy=math.nan,
            true_prob=math.nan,
            true_rank=0,
            answerable=True,
            following_ids=following_ids,
        )
        text = self.token_bytes.join(marked)
        if bound.objective.may_ask(pieces, position):
            truth = b"".join(bound.truth(task))
            if truth == text.removeprefix(b" "):
                return bound.prompt_ids(task), self.token_bytes.encode_plain(truth.decode())
        raise ValueError(
            f"--data.objective {type(bound.objective).__name__}: it does not ask for the text "
            f"{text.decode(errors='replace')!r} that {document.doc_id} marks; set the objective so that its "
            "answer is a mark's text, or set --data.objective null"
        )

    def _split(self, text: str, mark: Mark) -> tuple[TokenIds, TokenIds, TokenIds]:
        """Return the tokens before, in and after the mark, as they are in the whole document.

        Raises ValueError if a token straddles either end of the mark.
        """
        token_ids = self.token_bytes.encode_plain(text)
        ends, length = {0: 0}, 0
        for count, token in enumerate(token_ids, start=1):
            length += len(self.token_bytes[token])
            ends[length] = count
        first, last = (ends.get(len(text[:place].encode())) for place in (mark.start, mark.end))
        if first is None or last is None:
            raise ValueError(
                f"--data.source: the text {text[mark.start : mark.end]!r} is marked in a document, but no "
                "token begins or ends there with the policy's tokenizer; mark whole tokens (a word with the "
                "space before it), or train another tokenizer"
            )
        return token_ids[:first], token_ids[first:last], token_ids[last:]
