"""Runs with a falling budget of tokens and an order of tasks by tiers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from async_run import TASKS, lines_of, make, rollout_of, task_ids
from small_run import SCRIPT

from rpt_lightning.data.modules.tiers import Tiers
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ChatPrompt, ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.objectives.thought_budget import ThoughtBudget
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.settings import DynamicSampling, Evaluation, Selection
from rpt_lightning.training.callbacks.logs import RolloutSamples, StepLog
from rpt_lightning.training.checkpoint.callback import last_checkpoint

STEPS = 5
BUDGET = ThoughtBudget(initial=32, steps=STEPS, decay=0.75, weight=0.25, heldout=29)
# 32 * 0.75^(t/5): 0.75^0.2 = 0.94409, 0.75^0.4 = 0.89131, 0.75^0.6 = 0.84147, 0.75^0.8 = 0.79443
BY_STEP = [32, 30, 28, 26, 25, 24]


class Asked(ScriptedEngine):
    """Keeps the prompts that it was given, in two lists: drawn at a temperature, or greedily."""

    def __init__(self):
        super().__init__(SCRIPT)
        self.drawn, self.greedy = [], []

    def _generate(self, requests):
        for request in requests:
            (self.drawn if request.sampling.temperature else self.greedy).append(request.prompt_ids)
        return super()._generate(requests)


@pytest.fixture(scope="module")
def tiers(tiny_task_dir):
    """Three tiers of about equal size."""
    folder = TaskFolder(tiny_task_dir, "train")
    entropy = np.concatenate([folder.document(index)["entropy"] for index in range(len(folder))])
    bounds = tuple(float(value) for value in np.quantile(entropy, [1 / 3, 2 / 3]))
    return Tiers(bounds=bounds, first=(0.8, 0.2, 0.0), last=(0.0, 0.2, 0.8), steps=STEPS)


def budgeted(make_run, steps, engine, *, budget=BUDGET, tiers=None, rollout_options=None, **options):
    data_options = options.pop("data_options", {}) | ({} if tiers is None else {"tiers": tiers})
    return make(
        make_run,
        steps,
        engine,
        rollout_options={"thought_budget": budget, "max_prompt_tokens": 160} | (rollout_options or {}),
        data_options=data_options,
        **options,
    )


def text_of(module, prompt_ids):
    return module.tokenizer.decode(list(prompt_ids))


def test_the_schedule_of_these_tests():
    assert [BUDGET.at(step) for step in range(STEPS + 1)] == BY_STEP


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_every_completion_was_asked_for_with_the_budget_of_its_step(make_run, tmp_path, tiers, staleness):
    engine = Asked()
    trainer, module, data, watch = budgeted(
        make_run, STEPS, engine, tiers=tiers, staleness=staleness, run_dir=tmp_path / "run", more=[StepLog()],
        rollout_options={"dynamic_sampling": DynamicSampling(from_step=0, max_factor=3.0)},
    )  # fmt: skip
    trainer.fit(module, data)
    for step, groups in enumerate(watch.batches):
        for group in groups:
            assert group.task.budget == BY_STEP[step]
            assert f"answer in at most {BY_STEP[step]} tokens." in text_of(module, group.prompt_ids)
            assert group.prompt_ids in engine.drawn
    lines = lines_of(tmp_path / "run")
    assert [line["rollout/thought_budget"] for line in lines] == BY_STEP[:STEPS]
    assert sum(line["rollout/replaced_groups"] for line in lines) > 0  # further tasks were posed as well
    mixed = [0.75 * line["reward/objective_mean"] + 0.25 * line["reward/length_mean"] for line in lines]
    assert mixed == pytest.approx([line["reward/mean"] for line in lines], abs=1e-6)
    assert all(0 < line["reward/length_mean"] < 1 for line in lines)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(make_run, tmp_path, tiers, stop_at):
    def fit(steps, folder, ckpt_path=None):
        trainer, module, data, watch = budgeted(
            make_run, steps, ScriptedEngine(SCRIPT), tiers=tiers, staleness=0, run_dir=folder,
            more=[RolloutSamples(every_n_steps=1)],
            rollout_options={"dynamic_sampling": DynamicSampling(from_step=0, max_factor=2.0)},
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        samples = {path.name: path.read_text() for path in sorted((folder / "rollouts").glob("*.jsonl"))}
        return watch, samples, data.stream.place

    whole, samples, place = fit(STEPS, tmp_path / "whole")
    fit(stop_at, tmp_path / "parts")
    resumed, resumed_samples, resumed_place = fit(
        STEPS, tmp_path / "parts", ckpt_path=str(last_checkpoint(tmp_path / "parts"))
    )
    assert torch.equal(resumed.weights[-1], whole.weights[-1])
    assert resumed_samples == samples
    assert len(set(samples.values())) == STEPS
    assert resumed.batches == whole.batches[stop_at:]
    assert resumed_place == place


def test_rollouts_ahead_go_on_with_the_same_tasks_and_budgets(make_run, tmp_path, tiers):
    """What is under way at a stop is drawn again, with the tiers and the budget of its own step."""

    def fit(steps, folder, ckpt_path=None):
        trainer, module, data, watch = budgeted(
            make_run, steps, ScriptedEngine(SCRIPT), tiers=tiers, staleness=2, run_dir=folder
        )
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return watch.batches

    whole = fit(STEPS, tmp_path / "whole")
    first = fit(2, tmp_path / "parts")
    rest = fit(STEPS, tmp_path / "parts", ckpt_path=str(last_checkpoint(tmp_path / "parts")))
    assert task_ids([*first, *rest]) == task_ids(whole)
    assert [group.prompt_ids for groups in [*first, *rest] for group in groups] == [
        group.prompt_ids for groups in whole for group in groups
    ]


def test_easy_tasks_come_first(make_run, tiers):
    *_, watch = run = budgeted(make_run, STEPS, ScriptedEngine(SCRIPT), tiers=tiers, staleness=0)
    run[0].fit(*run[1:3])
    entropy = [[group.task.entropy for group in groups] for groups in watch.batches]
    assert all(len(values) == TASKS for values in entropy)
    assert max(entropy[0] + entropy[1]) <= tiers.bounds[1]  # the hard tier has probability 0
    assert min(entropy[4]) > tiers.bounds[0]  # 4 of 5 steps are beyond 70 %


def test_held_out_text_is_always_asked_with_one_budget(make_run, tmp_path):
    def checked(engine, module, num):
        assert len(engine.greedy) == num
        for prompt_ids in engine.greedy:
            assert "answer in at most 29 tokens." in text_of(module, prompt_ids)

    data_options = {"num_eval_tasks": 4, "eval_batch_size": 4}
    own = {"data_options": data_options, "run_dir": tmp_path / "run"}
    more = {"evaluation": Evaluation(thought_controls=True)}
    engine = Asked()
    trainer, module, data, _ = budgeted(
        make_run, 2, engine, staleness=1, limit_val_batches=1.0, val_check_interval=1, rollout_options=more,
        **own,
    )  # fmt: skip
    trainer.fit(module, data)
    checked(engine, module, 2 * 4 * 4)  # two validations: 4 answers, each with 3 controls
    engine = Asked()
    trainer, module, data, _ = budgeted(
        make_run, 2, engine, staleness=0, limit_val_batches=1.0, rollout_options=more, **own
    )
    trainer.validate(module, data, ckpt_path=str(last_checkpoint(tmp_path / "run")), weights_only=True)
    checked(engine, module, 4 * 4)


class InABox(NextTokenObjective):
    """Its answer without a thought stands in a box behind the prompt, so its score depends on the prompt."""

    direct_sequence = Objective.direct_sequence


def test_tasks_are_posed_before_they_are_selected(make_run):
    trainer, module, data, watch = budgeted(
        make_run, 2, ScriptedEngine(SCRIPT), staleness=0,
        rollout_options={"selection": Selection(max_true_prob=0.999), "max_prompt_tokens": 160},
    )  # fmt: skip
    rollout_of(trainer).objective = InABox(ContinuationPrompt(), PrefixMatchReward())
    trainer.fit(module, data)
    assert [group.task.budget for groups in watch.batches for group in groups] == [32] * TASKS + [30] * TASKS


def test_a_chat_prompt_states_it_before_the_context(make_run):
    trainer, module, data, watch = budgeted(
        make_run, 2, ScriptedEngine(SCRIPT), staleness=0, rollout_options={"max_prompt_tokens": 500},
        module_options={"ntp_weight": 0.1, "ntp_in_prompt": True},
    )  # fmt: skip
    rollout_of(trainer).objective = NextTokenObjective(ChatPrompt(), PrefixMatchReward())
    trainer.fit(module, data)
    for step, groups in enumerate(watch.batches):
        for group in groups:
            start, context = group.num_prefix_tokens, group.task.context_ids
            assert group.prompt_ids[start : start + len(context)] == context
            assert f"at most {BY_STEP[step]} tokens." in text_of(module, group.prompt_ids[:start])


def test_a_budget_that_nothing_depends_on_changes_nothing(make_run, tmp_path):
    silent = dataclasses.replace(BUDGET, weight=0.0, wording=None)
    weights = []
    for number, budget in enumerate([ThoughtBudget(), silent, BUDGET]):
        trainer, module, data, watch = budgeted(
            make_run, 2, ScriptedEngine(SCRIPT), budget=budget, staleness=0, run_dir=tmp_path / str(number)
        )
        trainer.fit(module, data)
        weights.append(watch.weights[-1])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            ThoughtBudget(initial=32, steps=5, decay=0.1),
            "smallest budget is 3 tokens, but the form of an answer",
        ),
        (ThoughtBudget(initial=800, steps=5), "largest budget is 800 tokens.*max_completion_tokens 32"),
    ],
    ids=["form", "limit"],
)
def test_a_budget_that_cannot_be_kept_is_refused_before_the_engine_starts(make_run, budget, message):
    engine = ScriptedEngine(SCRIPT)
    trainer, module, data, _ = budgeted(make_run, 2, engine, budget=budget, staleness=0)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, data)
    assert "start" not in engine.events


def test_a_prompt_with_a_budget_that_does_not_fit(make_run):
    run = budgeted(
        make_run, 2, ScriptedEngine(SCRIPT), staleness=0, rollout_options={"max_prompt_tokens": 64}
    )
    with pytest.raises(
        ValueError, match=r"max_prompt_tokens 64: the longest context .* the prompt template adds"
    ):
        run[0].fit(*run[1:3])
