"""Does the thought do anything? The same position is answered after an empty thought and after the thought of another position.

Both force the thought and let the policy go on inside the box, so what differs from the ordinary answer is the thought alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.rollout.engine import RolloutEngine
from rpt_lightning.tasks.answer import BOX_OPEN
from rpt_lightning.tasks.objective import BoundObjective
from rpt_lightning.types import Completion, GenerationRequest, RolloutGroup, SamplingSettings, TokenIds

MAX_ANSWER_TOKENS = 16


def thought_controls(engine: RolloutEngine, objective: BoundObjective, groups: Sequence[RolloutGroup]) -> dict[str, list[bool]]:
    """Greedy answers of ``groups`` (one completion each) under each control: whether each was right.

    "shuffled_thought" gives group ``i`` the thought of group ``i + len(groups) // 2``: far away, since neighbours share a document. A completion
    without the answer's form has no thought to give, and counts as an empty one.
    """
    thoughts = [_thought_ids(objective, group.completions[0]) for group in groups]
    half = len(thoughts) // 2
    forced: dict[str, list[TokenIds]] = {"empty_thought": [()] * len(groups), "shuffled_thought": thoughts[half:] + thoughts[:half]}
    return {name: _answers(engine, objective, groups, given) for name, given in forced.items()}


def _answers(engine: RolloutEngine, objective: BoundObjective, groups: Sequence[RolloutGroup], thoughts: Sequence[TokenIds]) -> list[bool]:
    sampling = SamplingSettings(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS, stop_token_ids=objective.prompt.stop_token_ids)
    requests = [
        GenerationRequest(
            task_id=group.task.task_id, prompt_ids=group.prompt_ids + objective.prompt.answer_prefix_ids(thought), n=1, seed=0, sampling=sampling
        )
        for group, thought in zip(groups, thoughts, strict=True)
    ]
    # What was forced belongs to the answer: the parser must see the box's beginning.
    forced = (objective.prompt.think_close or b"") + BOX_OPEN
    right = []
    for group, (completion,) in zip(groups, engine.generate(requests), strict=True):
        prediction = objective.parse(forced + completion.text_bytes)
        right.append(objective.rewards(group.task, [prediction])[0] == 1.0)
    return right


def _thought_ids(objective: BoundObjective, completion: Completion) -> TokenIds:
    """What stands before the last answer in the policy's own tokens; empty where the completion has no answer."""
    ids, mark = completion.token_ids, objective.prompt.answer_open_ids
    starts = [start for start in range(len(ids) - len(mark) + 1) if ids[start : start + len(mark)] == mark]
    return ids[: starts[-1]] if starts else ()
