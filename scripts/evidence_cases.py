"""The cases of `python scripts/evidence.py answers`.

Each case states what it asks, in which world, and what we expected before it ran.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NO_QUESTION = {"prompt": "ContinuationPrompt", "question": ""}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One starting model: the world, the source of its worked examples, and the objective.

    ``source`` has options of the source of tasks and worked examples. ``objective`` has options of the
    objective, in the run and in `rpt prepare`. ``examples`` has further flags of the starting model's run,
    and ``run`` of RPT's.
    """

    name: str
    world: str
    objective: str
    options: dict[str, object] = field(default_factory=dict)
    prompt: dict[str, object] = field(default_factory=dict)
    examples: dict[str, object] = field(default_factory=dict)
    prepare: dict[str, object] = field(default_factory=dict)
    run: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of RPT. ``groups`` are its kinds of positions, each with what we expected of it.

    ``tasks`` has further options of the source of the tasks.
    """

    name: str
    family: str
    what: str
    groups: dict[str, str]
    tasks: dict[str, object] = field(default_factory=dict)


def _sentences(wrapper: str) -> dict[str, object]:
    return {"--data.source": wrapper, "--data.source.source": "Cups"}


FAMILIES = (
    Family(
        name="masked-span",
        world="Origins",
        objective="MaskedSpanObjective",
        prompt=NO_QUESTION,
        examples={
            "--data.source": "Origins",
            "--data.source.untold": 0.5,
            "--data.prompt": "null",
            "--data.objective": "MaskedSpanObjective",
            "--data.objective.prompt": "ContinuationPrompt",
            "--data.objective.question": "",
        },
        prepare={"--source": "Origins", "--source.untold": 0.5, "--min_context": 1},
        run={"--rollout.max_prompt_tokens": 256},
    ),
    Family(
        name="next-segment",
        world="Cups",
        objective="NextSegmentObjective",
        prompt={"prompt": "ContinuationPrompt"},
        examples=_sentences("SentenceAnswers"),
        prepare={"--source": "SentenceAnswers", "--source.source": "Cups"},
        run={"--rollout.max_prompt_tokens": 256, "--rollout.sampling.max_completion_tokens": 80},
    ),
    Family(
        name="next-sentence",
        world="Cups",
        objective="NextSentenceObjective",
        options={"num_from_others": 3, "hardest_of": 16},
        prompt={"prompt": "ContinuationPrompt"},
        examples=_sentences("SentenceChoices"),
        prepare={"--source": "SentenceAnswers", "--source.source": "Cups"},
        run={"--rollout.max_prompt_tokens": 384, "--rollout.sampling.max_completion_tokens": 80},
    ),
)

# What we expected was written before the runs.
CASES = (
    Case(
        name="masked-span",
        family="masked-span",
        what="a cup hidden in a game of `Origins`, half of which do not say where the ball ended",
        groups={
            "first, told": "above 90 %: only the text behind the span says it, and thinking undoes the moves",
            "last, told": "above 90 %: the text before it says it, as in the demo",
            "first, untold": "12.5 % +- 6: nobody can know",
        },
    ),
    Case(
        name="next-segment",
        family="next-segment",
        what="the last sentence of a game, written out",
        groups={"all": "above 90 %"},
    ),
    Case(
        name="next-segment-noise",
        family="next-segment",
        what="the same, but it names any cup",
        groups={"all": "12.5 % +- 4"},
        tasks={"noise": 1.0},
    ),
    Case(
        name="next-sentence",
        family="next-sentence",
        what="which of four sentences ends the game",
        groups={"all": "above 80 %"},
    ),
    Case(
        name="next-sentence-noise",
        family="next-sentence",
        what="the same, but the last sentence names any cup",
        groups={"all": "25 % +- 5"},
        tasks={"noise": 1.0},
    ),
)
