from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import DenseReward, PrefixMatchReward, Reward
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.rollout.settings import Sampling
from rpt_lightning.types import TokenTask, TrainSequence

LINES = ["hm</think>\\boxed{ the}", "hm</think>\\boxed{ sum}", "no box"]


def make_task(doc: str, position: int) -> TokenTask:
    return TokenTask(
        task_id=f"{doc}:{position}", doc_id=doc, position=position,
        context_ids=tuple(range(40, 40 + position)), continuation_ids=(1, 2), continuation=(b" the", b" end"),
        entropy=1.0, true_prob=0.5, true_rank=0, answerable=True,
    )  # fmt: skip


TASKS = [make_task("b", 9), make_task("a", 7), make_task("b", 3), make_task("a", 2)]


@pytest.fixture
def engine(tiny_model_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with ScriptedEngine(LINES) as engine:
        engine.start(str(tiny_model_dir), seed=0)
        engine.update_weights(model.named_parameters(remove_duplicate=False), version=5)
        yield engine


def bind(tokenizer, reward: Reward) -> BoundObjective:
    return NextTokenObjective(ContinuationPrompt(), reward).bind(tokenizer)


@pytest.fixture
def rollouter(engine: ScriptedEngine, tiny_tokenizer) -> Rollouter:
    return Rollouter(
        engine,
        bind(tiny_tokenizer, PrefixMatchReward()),
        run_seed=1,
        group_size=6,
        sampling=Sampling(max_completion_tokens=32),
    )


def test_groups_are_read_and_paid_in_the_order_of_the_tasks(rollouter: Rollouter) -> None:
    groups = rollouter.rollout(TASKS)
    assert [group.task for group in groups] == TASKS
    for group in groups:
        context_ids = group.task.context_ids
        assert group.prompt_ids[group.num_prefix_tokens :][: len(context_ids)] == context_ids
    paid = {
        LINES[0].encode(): (b" the", 1.0),
        LINES[1].encode(): (b" sum", 0.0),
        LINES[2].encode(): (None, 0.0),
    }
    for group in groups:
        assert group.prompt_ids == rollouter.objective.prompt.prompt_ids(group.task.context_ids)
        assert len(group.completions) == 6
        for completion, prediction, reward in zip(
            group.completions, group.predictions, group.rewards, strict=True
        ):
            assert (prediction, reward) == paid[completion.text_bytes]
            assert completion.policy_version == 5
    assert {reward for group in groups for reward in group.rewards} == {0.0, 1.0}


def test_the_engine_sees_a_document_at_a_time_shortest_context_first(
    rollouter: Rollouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    generate = rollouter.engine.generate

    def listen(requests):
        asked.extend(request.task_id for request in requests)
        return generate(requests)

    monkeypatch.setattr(rollouter.engine, "generate", listen)
    rollouter.rollout(TASKS)
    assert asked == ["a:2", "a:7", "b:3", "b:9"]


def afresh(rollouter: Rollouter) -> Rollouter:
    return Rollouter(
        rollouter.engine,
        rollouter.objective,
        run_seed=1,
        group_size=6,
        sampling=Sampling(max_completion_tokens=32),
    )


def test_a_group_depends_on_its_task_alone_and_may_be_drawn_in_parts(rollouter: Rollouter) -> None:
    together = rollouter.rollout(TASKS)
    alone = afresh(rollouter)
    for task, group in zip(TASKS, together, strict=True):
        parts = [alone.rollout([task], n=2)[0].completions for _ in range(3)]
        assert sum(parts, ()) == group.completions


def test_a_task_given_twice_gets_other_completions(rollouter: Rollouter) -> None:
    first, second = rollouter.rollout([TASKS[0], TASKS[0]], n=8)
    (third,) = rollouter.rollout([TASKS[0]], n=8)  # a later round of the same step
    assert len({first.completions, second.completions, third.completions}) == 3
    (at_once,) = afresh(rollouter).rollout([TASKS[0]], n=24)
    assert first.completions + second.completions + third.completions == at_once.completions


def test_what_was_drawn_with_other_weights_does_not_count(
    rollouter: Rollouter, engine: ScriptedEngine
) -> None:
    """A run that resumes has drawn nothing with the earlier versions."""
    rollouter.rollout(TASKS)
    engine.update_weights(engine.read_weights(engine.weight_names).items(), version=6)
    assert rollouter.rollout(TASKS) == afresh(rollouter).rollout(TASKS)


def test_greedy_answers_neither_count_nor_change(rollouter: Rollouter) -> None:
    answers = rollouter.rollout(TASKS, n=1, temperature=0.0)
    sampled = rollouter.rollout(TASKS)
    assert rollouter.rollout(TASKS, n=1, temperature=0.0) == answers
    assert sampled == afresh(rollouter).rollout(TASKS)


def test_other_runs_and_versions_draw_other_completions(
    rollouter: Rollouter, engine: ScriptedEngine, tiny_tokenizer
) -> None:
    said = [group.predictions for group in rollouter.rollout(TASKS)]
    other_run = Rollouter(
        engine, rollouter.objective, run_seed=2, group_size=6, sampling=Sampling(max_completion_tokens=32)
    )
    assert [group.predictions for group in other_run.rollout(TASKS)] != said
    weights = engine.read_weights(engine.weight_names)
    engine.update_weights(weights.items(), version=6)
    assert [group.predictions for group in rollouter.rollout(TASKS)] != said


def test_evaluation_may_ask_for_one_greedy_completion(rollouter: Rollouter) -> None:
    groups = rollouter.predict(TASKS, n=1, temperature=0.0)
    assert [len(group.completions) for group in groups] == [1, 1, 1, 1]


def test_predictions_on_heldout_text_do_not_ask_the_reward(
    rollouter: Rollouter, engine: ScriptedEngine, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward may query the policy or a judge, and held-out accuracy does not depend on it."""
    reward = DenseReward()

    def refuse(*args: object) -> None:
        raise AssertionError("the reward was asked")

    monkeypatch.setattr(DenseReward, "group_rewards", refuse)
    monkeypatch.setattr(DenseReward, "scored_sequences", refuse)
    dense = Rollouter(
        engine,
        bind(tiny_tokenizer, reward),
        run_seed=1,
        group_size=6,
        sampling=Sampling(max_completion_tokens=32),
        score=refuse,  # type: ignore[arg-type]
    )
    # The prefix-match reward is 1 for right predictions and 0 for others.
    assert dense.predict(TASKS, n=6) == rollouter.rollout(TASKS)
    with pytest.raises(AssertionError, match="the reward was asked"):
        dense.rollout(TASKS)


def test_completions_of_other_weights_are_an_error(
    rollouter: Rollouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = rollouter.engine.generate

    def stale(requests):
        rows = generate(requests)
        return [[replace(completion, policy_version=4) for completion in rows[0]], *rows[1:]]

    monkeypatch.setattr(rollouter.engine, "generate", stale)
    with pytest.raises(
        RuntimeError, match=r"task 'a:2': completions of policy versions \[4\], the engine holds 5"
    ):
        rollouter.rollout(TASKS)


def test_a_prompt_beyond_the_limit_is_an_error_that_names_the_task(
    engine: ScriptedEngine, tiny_tokenizer
) -> None:
    limited = Rollouter(
        engine,
        bind(tiny_tokenizer, PrefixMatchReward()),
        run_seed=1,
        sampling=Sampling(max_completion_tokens=32),
        max_prompt_tokens=8,
    )
    with pytest.raises(ValueError, match=r"task 'b:9'.*max_prompt_tokens=8"):
        limited.rollout(TASKS)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"group_size": 1}, "group_size=1"), ({"sampling": Sampling(temperature=0.0)}, "temperature=0.0")],
)
def test_settings_that_cannot_teach_are_refused(
    engine: ScriptedEngine, tiny_tokenizer, setting: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Rollouter(engine, bind(tiny_tokenizer, PrefixMatchReward()), run_seed=1, **setting)


def test_dense_rewards_are_given_the_policys_first_token_probabilities(
    engine: ScriptedEngine, tiny_tokenizer
) -> None:
    objective = bind(tiny_tokenizer, DenseReward())
    with pytest.raises(ValueError, match=r"DenseReward.*give score"):
        Rollouter(engine, objective, run_seed=1)

    def score(sequences: Sequence[TrainSequence]) -> list[tuple[float, ...]]:
        assert {len(sequence.target_ids) for sequence in sequences} == {1}
        return [(math.log(len(sequence.prompt_ids) / 100),) for sequence in sequences]

    rollouter = Rollouter(
        engine, objective, run_seed=1, group_size=6, sampling=Sampling(max_completion_tokens=32), score=score
    )
    for group in rollouter.rollout(TASKS):
        worth = {b" the": 1.0, b" sum": pytest.approx(len(group.task.context_ids) / 100), None: 0.0}
        assert group.rewards == tuple(worth[prediction] for prediction in group.predictions)
