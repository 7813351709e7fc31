"""Measure whether the thought matters, by answering the same position after other thoughts.

The controls are an empty thought, another document's thought, and filler of the same length. Each forces the
thought and lets the policy continue inside the box, so the thought is the only difference from the ordinary
answer. Filler separates the content of a thought from the extra computation that its tokens allow
(arXiv:2404.15758).
"""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.box import BOX_OPEN
from rpt_lightning.objectives.thought import thought_span
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.forced_answer import forced_answers
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.types import Completion, RolloutGroup, TokenIds

MAX_ANSWER_TOKENS = 16


def thought_controls(rollouter: Rollouter, groups: Sequence[RolloutGroup]) -> dict[str, list[bool | None]]:
    """Answer ``groups`` (one completion each) greedily under each control.

    Returns for each control and group whether the answer was right, or None if it could not be measured.

    - "empty_thought" closes the thought at once.
    - "shuffled_thought" gives group ``i`` the thought of the first group from another document, searching
      from ``i + len(groups) // 2`` on. It cannot be measured if all groups come from one document. It is the
      only control that depends on the other ``groups``.
    - "filler_thought" has a full stop for each token of the position's own thought.

    A position cannot be measured if prompt, thought and answer exceed the engine's limit. A completion that
    never closed its thought has none to give, so its thought counts as empty.
    """
    thoughts = [
        thought_ids(rollouter.engine, rollouter.objective, group.completions[0]) or () for group in groups
    ]
    forced: dict[str, list[TokenIds | None]] = {
        "empty_thought": [()] * len(groups),
        "shuffled_thought": [None if donor is None else thoughts[donor] for donor in _donors(groups)],
        "filler_thought": [(rollouter.objective.prompt.filler_id,) * len(thought) for thought in thoughts],
    }
    return {name: _answers(rollouter, groups, given) for name, given in forced.items()}


def _answers(
    rollouter: Rollouter, groups: Sequence[RolloutGroup], thoughts: Sequence[TokenIds | None]
) -> list[bool | None]:
    objective = rollouter.objective.objective
    answers = forced_answers(
        rollouter,
        [group.task for group in groups],
        thoughts,
        max_tokens=objective.tokens_after_thought or MAX_ANSWER_TOKENS,
    )
    right: list[bool | None] = [None] * len(groups)
    for index, completion in enumerate(answers):
        if completion is not None:
            prediction = objective.read_answer(completion.text_bytes)
            right[index] = rollouter.objective.is_right(prediction, groups[index].task)
    return right


def _donors(groups: Sequence[RolloutGroup]) -> list[int | None]:
    """Return for each group the index of the group that donates its thought."""
    num = len(groups)
    return [
        next(
            (
                j
                for j in ((i + num // 2 + step) % num for step in range(num))
                if groups[j].task.doc_id != group.task.doc_id
            ),
            None,
        )
        for i, group in enumerate(groups)
    ]


def thought_ids(engine: RolloutEngine, objective: BoundObjective, completion: Completion) -> TokenIds | None:
    """Return the policy's own tokens before the last closing marker, or None if there is none.

    If thoughts have no markers, the last box takes the marker's place. A token that overlaps the marker is
    left out.
    """
    span = thought_span(completion, objective.prompt.think_close or BOX_OPEN, engine._bytes_of)
    return None if span is None else completion.token_ids[: span[0]]
