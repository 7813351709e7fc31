from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import ConditionalDenseReward, PrefixMatchReward, Reward
from rpt_lightning.rollout.dynamic_sampling import fill_batch
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.pilot import PilotRollout
from rpt_lightning.rollout.rollouter import Rollouter, Score
from rpt_lightning.rollout.settings import Sampling
from rpt_lightning.types import AnsweredTask, RolloutGroup, TokenTask, TrainSequence

LINES = ["hm</think>\\boxed{ the}", "hm</think>\\boxed{ sum}", "no box", "</think>\\boxed{ a}"]


def make_task(number: int) -> TokenTask:
    return TokenTask(
        task_id=f"d:{number}", doc_id="d", position=number, context_ids=tuple(range(40, 43 + number)),
        continuation_ids=(1, 2), continuation=(b" the", b" end"), entropy=1.0, true_prob=0.5, true_rank=0,
        answerable=True,
    )  # fmt: skip


TASKS = [make_task(number) for number in range(12)]


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with ScriptedEngine(LINES) as engine:
        engine.start(str(tiny_model_dir), seed=0)
        engine.update_weights(model.named_parameters(remove_duplicate=False), version=5)
        yield engine


@pytest.fixture
def make_rollouter(engine: ScriptedEngine, tiny_tokenizer):
    def make(reward: Reward | None = None, score: Score | None = None, group_size: int = 6) -> Rollouter:
        objective = NextTokenObjective(ContinuationPrompt(), reward or PrefixMatchReward()).bind(
            tiny_tokenizer
        )
        return Rollouter(
            engine,
            objective,
            run_seed=1,
            group_size=group_size,
            sampling=Sampling(max_completion_tokens=32),
            score=score,
        )

    return make


def check_parts(groups: Sequence[RolloutGroup], whole: Sequence[RolloutGroup], *, pilot_size: int) -> None:
    """Each group is the whole one, or its beginning if the rewards there are equal."""
    for group, full in zip(groups, whole, strict=True):
        if len(set(full.rewards[:pilot_size])) > 1:
            assert group == full
        else:
            assert (group.task, group.prompt_ids, group.is_live) == (full.task, full.prompt_ids, False)
            assert group.completions == full.completions[:pilot_size]
            assert group.predictions == full.predictions[:pilot_size]


@pytest.mark.parametrize("pilot_size", [2, 5])
def test_a_filled_group_is_that_of_an_undivided_draw(make_rollouter, pilot_size: int) -> None:
    tasks = [*TASKS, *TASKS[:3]]  # some appear twice, as in a small corpus that starts over within a step
    undivided = make_rollouter()
    whole, again = undivided.rollout(tasks), undivided.rollout(TASKS[:3])
    pilot = PilotRollout(make_rollouter(), pilot_size=pilot_size)
    groups = pilot.rollout(tasks)
    check_parts(groups, whole, pilot_size=pilot_size)
    # A later round continues where the undivided draw does.
    check_parts(pilot.rollout(TASKS[:3]), again, pilot_size=pilot_size)
    sizes = {len(group.completions) for group in groups}
    assert sizes == {pilot_size, 6}


def test_the_engine_draws_the_rest_of_mixed_groups_only(make_rollouter, engine: ScriptedEngine) -> None:
    del engine.events[:]
    groups = PilotRollout(make_rollouter(), pilot_size=2).rollout(TASKS)
    num_filled = sum(len(group.completions) == 6 for group in groups)
    assert 0 < num_filled < len(TASKS)
    assert engine.events == ["generate 12 requests", f"generate {num_filled} requests"]


def test_a_reward_that_looks_at_the_group_pays_the_whole_group(make_rollouter) -> None:
    asked: list[int] = []

    def score(sequences: Sequence[TrainSequence]) -> list[tuple[float, ...]]:
        asked.append(len({sequence.prompt_ids for sequence in sequences}))
        return [(-float(sequence.target_ids[0]),) for sequence in sequences]

    whole = make_rollouter(ConditionalDenseReward(), score).rollout(TASKS)
    del asked[:]
    pilot = PilotRollout(make_rollouter(ConditionalDenseReward(), score), pilot_size=3)
    groups = pilot.rollout(TASKS)
    filled = [(group, full) for group, full in zip(groups, whole, strict=True) if len(group.completions) == 6]
    assert len(filled) > 3
    assert all(group == full for group, full in filled)
    assert any(len(set(group.rewards)) == 3 for group, _ in filled)
    # The policy's passes are collectives, so a rank without tasks needs as many.
    assert asked == [12, len(filled)]
    assert pilot.rollout([]) == []
    assert asked[2:] == [0, 0]


class PaysWhatHasNoAnswer(Reward):
    def group_rewards(self, answered: AnsweredTask) -> tuple[float, ...]:
        return tuple(float(prediction is None) for prediction in answered.predictions)


@pytest.mark.parametrize("masks_truncated", [False, True])
def test_masked_completions_fill_no_pilot(
    tiny_model_dir: Path, tiny_tokenizer, masks_truncated: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    # The second text never ends in time.
    with ScriptedEngine(["hm</think>\\boxed{ a}", "abcdefgh " * 20]) as engine:
        engine.start(str(tiny_model_dir), seed=0)
        engine.update_weights(model.named_parameters(remove_duplicate=False), version=5)
        objective = NextTokenObjective(ContinuationPrompt(), PaysWhatHasNoAnswer()).bind(tiny_tokenizer)
        rollouter = Rollouter(
            engine,
            objective,
            run_seed=1,
            group_size=6,
            sampling=Sampling(max_completion_tokens=32),
            masks_truncated=masks_truncated,
        )
        groups = PilotRollout(rollouter, pilot_size=2).rollout(TASKS)
    assert any(len(set(group.rewards[:2])) == 2 for group in groups)  # one of the two is truncated
    assert {len(group.completions) for group in groups} == ({2} if masks_truncated else {2, 6})


def test_dead_pilots_give_their_place_to_new_tasks(make_rollouter) -> None:
    stream = iter(TASKS[3:])
    pilot = PilotRollout(make_rollouter(), pilot_size=2)
    filled = fill_batch(
        pilot.rollout, lambda wanted: [next(stream) for _ in range(*wanted)], TASKS[:3], max_extra_tasks=9
    )
    assert [len(group.completions) for group in filled.groups] == [6, 6, 6]
    assert {len(group.completions) for group in filled.replaced} == {2}


@pytest.mark.parametrize("pilot_size", [1, 6, 7])
def test_a_pilot_that_cannot_tell_or_save_anything_is_refused(make_rollouter, pilot_size: int) -> None:
    with pytest.raises(ValueError, match=rf"--rollout.pilot_size {pilot_size}: .*--rollout.group_size 6"):
        PilotRollout(make_rollouter(), pilot_size=pilot_size)
