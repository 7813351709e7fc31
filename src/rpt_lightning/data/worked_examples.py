"""Worked examples: a document up to an answer that can be worked out, a thought, and the answer in a box.

Some examples think and the others guess at once (arXiv:2510.11495 mixes the two): what reinforcement then finds depends on the share that thinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rpt_lightning.data.draw import uniform
from rpt_lightning.tasks.prompt import BoundPrompt
from rpt_lightning.tasks.token_bytes import TokenBytes
from rpt_lightning.types import Document, Mark, TokenIds, TrainSequence

DEPTH = "depth"  # the field that says how many steps a mark's thought makes, one after the other


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the curriculum.

    Args:
        steps: Optimizer steps that it lasts; the last phase lasts to the end, whatever this says.
        p_cot: Share of the examples that think. The others have an empty thought and the true answer.
        min_depth: Examples of smaller depth never think.
        max_depth: Examples of greater depth never think; null: all may.
        guesses: Whether examples that do not think are given at all.
        text: Whether the documents themselves are trained too.
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
        """Whether the curriculum lets an example of this mark think."""
        depth = mark.fields.get(DEPTH, self.min_depth)
        assert not isinstance(depth, str)
        return (
            mark.thought is not None
            and self.min_depth <= depth
            and (self.max_depth is None or depth <= self.max_depth)
        )


class ExampleWriter:
    """Writes the worked examples of documents.

    Args:
        prompt: The template that the policy will be asked with.
        token_bytes: Bytes of the policy's tokens.
        phases: The curriculum.
        seed: Seed of which examples think.
    """

    def __init__(
        self, prompt: BoundPrompt, token_bytes: TokenBytes, phases: Sequence[Phase], *, seed: int
    ) -> None:
        self.prompt = prompt
        self.token_bytes = token_bytes
        self.phases = phases
        self.seed = seed

    def phase(self, step: int) -> Phase:
        """The phase of a step, counted from 0."""
        for phase in self.phases[:-1]:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    def write(self, document: Document, *, step: int) -> list[TrainSequence]:
        """One example for each mark that ends at a token boundary, as the phase of ``step`` wants it."""
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
        context, answer = self._split(document.text, mark)
        return TrainSequence(
            prompt_ids=self.prompt.prompt_ids(context), target_ids=self.prompt.completion_ids(thought, answer)
        )

    def _split(self, text: str, mark: Mark) -> tuple[TokenIds, TokenIds]:
        """The tokens before the mark and those of its text, as they stand in the whole document. Raises ValueError where a token straddles an end."""
        token_ids = self.token_bytes.encode_plain(text)
        ends, length = {0: 0}, 0
        for count, token in enumerate(token_ids, start=1):
            length += len(self.token_bytes[token])
            ends[length] = count
        first, last = (ends.get(len(text[:place].encode())) for place in (mark.start, mark.end))
        if first is None or last is None:
            raise ValueError(
                f"--data.source: the text {text[mark.start : mark.end]!r} is marked in a document, but no token begins or ends there with the "
                "policy's tokenizer; mark whole tokens (a word with the space before it), or train another tokenizer"
            )
        return token_ids[:first], token_ids[first:last]
