"""The arms of `make evidence`.

Each arm states what it changes, which question it answers, and what we expected before it ran.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# RPT's settings in every arm. The base arm has risen by step 20. Each step has half the demo's tasks, so that
# three seeds of all arms take an afternoon.
STEPS, TASKS_PER_STEP = 20, 32

# The lengths of the first two phases of configs/demo/start.yaml, and its last step. Start models with other
# shares branch off after the second phase.
TAUGHT_STEPS, MIXED_STEPS, LAST_STEP = 200, 80, 380
BRANCH_STEP = TAUGHT_STEPS + MIXED_STEPS
TAUGHT = (f"{{steps: {TAUGHT_STEPS}, p_cot: 1.0, text: false}}", f"{{steps: {MIXED_STEPS}, p_cot: 1.0}}")


@dataclass(frozen=True, kw_only=True)
class Start:
    """A starting model, given by the phases of its curriculum.

    With ``branches`` it continues the base start after the second phase instead of starting from scratch.
    """

    name: str
    phases: tuple[str, ...]
    branches: bool = True


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run of the evidence.

    ``kind`` says how the arm trains: "rpt", or one of the rivals at the base arm's FLOPs. ``start`` and
    ``tasks`` name the starting model and the task folder. ``options`` are further flags of `rpt fit`.
    ``expected`` was written down before the arm ran.
    """

    name: str
    group: str
    what: str
    expected: str
    kind: Literal["rpt", "ntp", "sft"] = "rpt"
    start: str = "base"
    tasks: str = "base"
    options: tuple[str, ...] = field(default_factory=tuple)


def _p_cot(name: str, share: float) -> Start:
    return Start(name=name, phases=(*TAUGHT, f"{{steps: {LAST_STEP - BRANCH_STEP}, p_cot: {share:g}}}"))


def _depths(name: str, low: int, high: int) -> Start:
    """Build a starting model for which only examples of these depths think.

    They think more often in proportion, so that 12 % of all examples still think.
    """
    span, share = f"min_depth: {low}, max_depth: {high}", 0.12 * 12 / (high - low + 1)
    phases = (
        f"{{steps: {TAUGHT_STEPS}, p_cot: 1.0, {span}, guesses: false, text: false}}",
        f"{{steps: {MIXED_STEPS}, p_cot: 1.0, {span}, guesses: false}}",
        f"{{steps: {LAST_STEP - BRANCH_STEP}, p_cot: {share:.3f}, {span}}}",
    )
    return Start(name=name, phases=phases, branches=False)


BASE_START = _p_cot("base", 0.12)
STARTS = (
    BASE_START,
    *(_p_cot(f"p_cot-{share:g}", share) for share in (0, 0.01, 0.03, 0.5)),
    _depths("depth-1-4", 1, 4),
    _depths("depth-8-12", 8, 12),
)

SHARE, DEPTH, REWARD, STEP, RIVAL, SAMPLING, NOISE, BUDGET, OBJECTIVE = (
    "the share of worked examples that think",
    "the depth of the examples that think",
    "the reward",
    "the step",
    "the rivals at equal FLOPs",
    "sampling",
    "noise",
    "the thought budget",
    "objectives and worlds",
)
_REWARDS = "rpt_lightning.objectives.rewards.next_token"


def _reward(name: str) -> tuple[str, ...]:
    return ("--rollout.objective.reward", f"{_REWARDS}.{name}")


def _budget(decay: float, weight: float) -> tuple[str, ...]:
    """A budget that falls from 64 tokens. So small a model cannot read it, so no prompt states it."""
    flag = "--rollout.thought_budget"
    return (
        *(f"{flag}.initial", "64", f"{flag}.steps", str(STEPS), f"{flag}.wording", "null"),
        *(f"{flag}.decay", f"{decay:g}", f"{flag}.weight", f"{weight:g}"),
    )


_GAIN = (
    *("--rollout.objective", "InformationGainObjective", "--rollout.objective.boxed", "true"),
    *("--model.advantage_scale", "rloo", "--model.aggregation", "sequence_mean"),
)
# What else can be optimized (docs/objectives.md, docs/trunk.md), and the flags for it.
# Plain RPT is an arm of its own, so that all of them begin with the same weights on the same machine.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "rpt": (),
    "rloo": ("--model.advantage_scale", "rloo"),
    "maxrl": ("--model.advantage_scale", "maxrl"),
    "gain": _GAIN,
    "weighted": (*_GAIN, "--rollout.objective.gain", "weighted_prob"),
    "trunk": ("--model.ntp_weight", "0.3"),
}
# The worlds in which they are tried, and the arm that has the same start model and tasks.
WORLDS = {"12 % think": "base", "3 % think": "p_cot-0.03", "half are noise": "noise-50"}
# Written before the runs, for the worlds in this order.
_EXPECTED = {
    "rpt": ("as the base arm", "as the arm p_cot-0.03", "as the arm noise-50"),
    "rloo": ("within 3 points of RPT", "at least 5 points behind RPT", "within 3 points of RPT"),
    "maxrl": ("within 3 points of RPT", "at least 5 points ahead of RPT", "within 3 points of RPT"),
    "gain": ("below 60 %: it stops thinking", "below 40 %", "below 40 %: noise makes thoughts costly"),
    "weighted": ("above 95 %", "within 5 points of RPT", "above 90 %"),
    "trunk": (
        "within 3 points of RPT; no gain without a thought either",
        "within 5 points of RPT",
        "within 3 points of RPT",
    ),
}


def objective_arm(objective: str, world: str) -> str:
    """Return the name of an objective's arm in a world."""
    return f"{objective}@{WORLDS[world]}"


def _objective_arms() -> tuple[Arm, ...]:
    arms = []
    for objective, options in OBJECTIVES.items():
        for (world, plain), expected in zip(WORLDS.items(), _EXPECTED[objective], strict=True):
            start, tasks = (plain, "base") if plain.startswith("p_cot") else ("base", plain)
            arms.append(
                Arm(
                    name=objective_arm(objective, world),
                    group=OBJECTIVE,
                    what=f"{objective}, {world}",
                    expected=expected,
                    start=start,
                    tasks=tasks,
                    options=options,
                )
            )
    return tuple(arms)


ARMS = (
    Arm(
        name="base",
        group=SHARE,
        what="12 % of the start's examples think",
        expected="above 95 % after 20 steps; the length doubles",
    ),
    Arm(
        name="p_cot-0.5",
        group=SHARE,
        what="50 % think",
        start="p_cot-0.5",
        expected="above 95 %, and sooner than the base: every group holds thoughts",
    ),
    Arm(
        name="p_cot-0.03",
        group=SHARE,
        what="3 % think",
        start="p_cot-0.03",
        expected="above 90 %, later than the base",
    ),
    Arm(
        name="p_cot-0.01",
        group=SHARE,
        what="1 % think",
        start="p_cot-0.01",
        expected=(
            "found in some seeds and not in others within 20 steps: one group of 8 in 13 holds a thought"
        ),
    ),
    Arm(
        name="p_cot-0",
        group=SHARE,
        what="thinking was taught and then no longer shown (0 %)",
        start="p_cot-0",
        expected="not found: below 40 %, as before",
    ),
    Arm(
        name="depth-1-4",
        group=DEPTH,
        what="examples of depth 1 to 4 think; tested at 2 to 12",
        start="depth-1-4",
        expected="right at depth 1 to 4, and a step or two beyond; near chance at 8 to 12",
    ),
    Arm(
        name="depth-8-12",
        group=DEPTH,
        what="examples of depth 8 to 12 think; tested at 2 to 12",
        start="depth-8-12",
        expected="above 90 % at all depths: a long chain holds the short ones",
    ),
    Arm(
        name="trained-short",
        group=DEPTH,
        what="RPT on depth 1 to 6 alone, from the base start; tested at 2 to 12",
        tasks="short",
        expected="above 90 % at 8 to 12 too: RPT teaches whether to think, and how to was there",
    ),
    Arm(
        name="first-token",
        group=REWARD,
        what="first token",
        options=_reward("FirstTokenReward"),
        expected="as the base: answers are one token",
    ),
    Arm(
        name="dense",
        group=REWARD,
        what="dense",
        options=_reward("DenseReward"),
        expected="as the base, within 3 points (the paper: comparable)",
    ),
    Arm(
        name="conditional-dense",
        group=REWARD,
        what="conditional dense",
        options=_reward("ConditionalDenseReward"),
        expected="as the base, within 3 points (the paper: comparable)",
    ),
    Arm(
        name="no-std",
        group=STEP,
        what="advantages are not divided by their standard deviation",
        options=("--model.advantage_scale", "none"),
        expected="above 90 %, a little later: advantages are smaller",
    ),
    Arm(
        name="dynamic-sampling",
        group=STEP,
        what="dynamic sampling from step 10 on",
        options=("--rollout.dynamic_sampling.from_step", "10"),
        expected="as the base, at more rollouts: there is little left to learn when it begins to matter",
    ),
    Arm(
        name="pilots",
        group=STEP,
        what="pilots of 2 completions",
        options=("--rollout.pilot_size", "2"),
        expected="above 90 % at fewer completions; later, since 2 guesses that agree end a group",
    ),
    Arm(
        name="ntp",
        group=RIVAL,
        what="continual next-token training",
        kind="ntp",
        expected="below 30 %: one pass cannot follow the ball",
    ),
    Arm(
        name="sft",
        group=RIVAL,
        what="supervised training on worked examples that all think",
        kind="sft",
        expected="above 95 %: it is shown the thoughts that RPT has to find",
    ),
    Arm(
        name="temperature-0.6",
        group=SAMPLING,
        what="temperature 0.6",
        options=("--rollout.sampling.temperature", "0.6"),
        expected="later than at 1.0: thoughts begin with a token of 12 %, which 0.6 makes 3 %",
    ),
    Arm(
        name="group-4",
        group=SAMPLING,
        what="64 tasks x 4 completions",
        options=("--data.tasks_per_step", "64", "--rollout.group_size", "4"),
        expected="above 90 %, a little later: fewer groups hold a thought and a guess",
    ),
    Arm(
        name="group-16",
        group=SAMPLING,
        what="16 tasks x 16 completions",
        options=("--data.tasks_per_step", "16", "--rollout.group_size", "16"),
        expected="as the base",
    ),
    Arm(
        name="noise-50",
        group=NOISE,
        what="in half of the texts the last sentence names any cup",
        tasks="noise-50",
        expected="above 90 % on clean held-out text: noise rewards guesses and thoughts alike",
    ),
    Arm(
        name="noise-90",
        group=NOISE,
        what="in 90 % of the texts the last sentence names any cup",
        tasks="noise-90",
        expected="later, and not in every seed: one text in ten says which answers are right",
    ),
    Arm(
        name="budget-38",
        group=BUDGET,
        what="from 64 to 38 tokens, which suffice for all but the longest games; a tenth of the reward",
        options=_budget(0.6, 0.1),
        expected="at least 95 %, and no longer than the base",
    ),
    Arm(
        name="budget-19",
        group=BUDGET,
        what="from 64 to 19 tokens, which are too few for 5 moves or more; half of the reward",
        options=_budget(0.3, 0.5),
        expected="below 85 %, and shorter than the base: long games are guessed",
    ),
    *_objective_arms(),
)
