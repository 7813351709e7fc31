"""What the policy is asked at held-out positions, through the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.rollout.thought_controls import thought_controls, thought_ids
from rpt_lightning.types import RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldoutAnswer:
    """What a policy answered at one held-out position: greedily, under each thought control, and, where asked, several times at a temperature."""

    greedy: RolloutGroup
    thought_length: int | None
    controls: Mapping[str, bool | None]
    samples: RolloutGroup | None


def heldout_answers(
    rollouter: Rollouter, greedy: Sequence[RolloutGroup], *, num_samples: int, with_controls: bool
) -> list[HeldoutAnswer]:
    """The greedy answers (groups of one) with what goes with them; samples are drawn at the rollouter's temperature.

    ``greedy`` is one rank's share of a validation batch. Shuffled thoughts come from there only, so whose thought a position gets, and whether there is one of
    another document, depends on ``eval_batch_size`` and the number of data-parallel ranks; nothing else here does.
    """
    engine, objective = rollouter.engine, rollouter.objective
    controls = thought_controls(rollouter, greedy) if with_controls else {}
    samples = (
        rollouter.rollout([group.task for group in greedy], n=num_samples)
        if num_samples
        else [None] * len(greedy)
    )
    thoughts = [thought_ids(engine, objective, group.completions[0]) for group in greedy]
    return [
        HeldoutAnswer(
            greedy=group,
            thought_length=None if thought is None else len(thought),
            controls={name: correct[index] for name, correct in controls.items()},
            samples=samples[index],
        )
        for index, (group, thought) in enumerate(zip(greedy, thoughts, strict=True))
    ]
