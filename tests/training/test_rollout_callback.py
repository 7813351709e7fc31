"""The order of a step, its logged metrics, and the settings that are refused."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from small_run import SCRIPT
from watched_run import Watch, run

from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import ConditionalDenseReward, DenseReward, Reward
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.settings import DynamicSampling, Evaluation, Sampling
from rpt_lightning.training.callbacks.logs import StepLog
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.types import PromptTokens


def test_weights_go_in_before_every_rollout(make_run):
    engine = ScriptedEngine(SCRIPT)
    watch, *_ = run(make_run, 3, engine)
    assert engine.events == [
        "start", "update 0", "generate 8 requests", "update 1", "generate 8 requests",
        "update 2", "generate 8 requests", "close",
    ]  # fmt: skip
    for step, batch in enumerate(watch.batches):
        assert len(batch.groups) == 8
        assert {completion.policy_version for group in batch.groups for completion in group.completions} == {
            step
        }


class SleepyEngine(ScriptedEngine):
    """Gives its memory back whenever it can."""

    sleeps = True

    def _sleep(self) -> None:
        self.events.append("sleep")


def test_an_engine_sleeps_while_the_policy_trains_and_wakes_with_its_weights(make_run):
    awake, asleep = ScriptedEngine(SCRIPT), SleepyEngine(SCRIPT)
    _, trained, *_ = run(make_run, 2, awake)
    _, slept, *_ = run(make_run, 2, asleep)
    assert asleep.events == [
        "start",
        "update 0",
        "generate 8 requests",
        "sleep",
        "update 1",
        "generate 8 requests",
        "sleep",
        "close",
    ]
    for name, weight in trained.policy.named_parameters():
        assert torch.equal(weight, slept.policy.get_parameter(name))


def num_rolled_out(engine):
    return sum(int(event.split()[1]) for event in engine.events if event.startswith("generate"))


def test_dynamic_sampling_replaces_and_counts(make_run, tmp_path):
    engine = ScriptedEngine(SCRIPT)
    watch, _, data, _ = run(
        make_run,
        2,
        engine,
        rollout_options={"dynamic_sampling": DynamicSampling(from_step=1, max_factor=3.0)},
    )
    first, second = watch.batches
    assert len(first.groups) == len(second.groups) == 8
    assert sum(group.is_live for group in second.groups) > sum(group.is_live for group in first.groups)
    ids = [group.task.task_id for batch in watch.batches for group in batch.groups]
    assert len(set(ids)) == len(ids)
    rolled_out = num_rolled_out(engine)
    assert data.stream.state_dict()["index"] == rolled_out  # the cursor counts every task once


@pytest.mark.parametrize(
    "reward", [DenseReward(), ConditionalDenseReward()], ids=lambda reward: type(reward).__name__
)
def test_dense_rewards_are_the_policys_own_probabilities(make_run, reward, tiny_task_dir):
    # One line is right at some positions. In their groups the conditional reward rewards the other answers
    # too.
    folder = TaskFolder(tiny_task_dir, "train")
    firsts = Counter(
        folder.task(document, k).continuation[0]
        for document, count in enumerate(folder.num_positions)
        for k in range(count)
    )
    frequent = [token.decode() for token, _ in firsts.most_common(6)]
    engine = ScriptedEngine([f"?</think>\\boxed{{{token}}}" for token in frequent])
    watch = Watch()
    trainer, module, data = make_run(
        1, engine=lambda: engine, callbacks=[watch], data_options={"tasks_per_step": 64}
    )
    rollout = next(callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback))
    rollout.objective = NextTokenObjective(ContinuationPrompt(), reward)
    module.policy.materialize()
    start = module.policy.model.state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    trainer.fit(module, data)
    module.policy.model.load_state_dict(start)
    checked = num_unpaid_groups = 0
    for group in watch.batches[0].groups:
        num_unpaid_groups += not any(group.rewards)
        logits = module.policy.model(input_ids=torch.tensor([group.task.context_ids])).logits[0, -1]
        for prediction, paid in zip(group.predictions, group.rewards, strict=True):
            right = prediction is not None and prediction.startswith(group.task.continuation[0])
            if prediction is None or right or paid == 0.0:
                continue
            first = module.tokenizer(prediction.decode(), add_special_tokens=False)["input_ids"][0]
            assert paid == pytest.approx(logits.softmax(-1)[first].item(), rel=1e-3)
            checked += 1
    assert checked > 3
    assert (num_unpaid_groups > 0) == isinstance(reward, ConditionalDenseReward)


def step_lines(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def test_step_log_counts_truncated_and_replaced(make_run, tmp_path):
    engine = ScriptedEngine(SCRIPT)
    options = {"dynamic_sampling": DynamicSampling(from_step=1, max_factor=3.0)}
    run(make_run, 3, engine, more=[StepLog()], run_dir=tmp_path / "log", rollout_options=options)
    lines = step_lines(tmp_path / "log")
    assert len(lines) == 3
    assert (
        sum(line["rollout/truncated_frac"] for line in lines) > 0
    )  # one line of the script never ends in time
    assert all(line["rollout/boxed_frac"] < 1 for line in lines)
    assert lines[0]["rollout/replaced_groups"] == 0
    assert sum(line["rollout/replaced_groups"] for line in lines) == num_rolled_out(engine) - 3 * 8 > 0
    for line in lines:
        assert line["time/step_s"] > line["time/train_s"]
        trained_and_sampled = line["rollout/tokens"] + line["train/completion_tokens"]
        assert line["train/groups"] == line["rollout/live_groups"]
        assert line["perf/live_groups_per_s"] == pytest.approx(
            line["train/groups"] / line["time/step_s"], rel=1e-4
        )
        assert "rollout/cached_prompt_frac" not in line  # this engine has no cache
        assert line["perf/tokens_per_s"] == pytest.approx(trained_and_sampled / line["time/step_s"], rel=1e-4)


class PaysWhatHasNoAnswer(Reward):
    def group_rewards(self, answered):
        return tuple(float(prediction is None) for prediction in answered.predictions)


@pytest.mark.parametrize("truncated", ["zero_reward", "mask"])
def test_groups_that_are_live_by_masked_completions_alone_are_dead(make_run, tmp_path, truncated):
    script = ["?</think>\\boxed{e}", "abcdefgh " * 20]  # the second never ends in time
    trainer, module, data = make_run(
        1,
        engine=lambda: ScriptedEngine(script),
        callbacks=[StepLog()],
        run_dir=tmp_path / "log",
        module_options={"truncated": truncated},
        rollout_options={"dynamic_sampling": DynamicSampling(from_step=0, max_factor=2.0)},
    )
    rollout = next(callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback))
    rollout.objective = NextTokenObjective(ContinuationPrompt(), PaysWhatHasNoAnswer())
    trainer.fit(module, data)
    (line,) = step_lines(tmp_path / "log")
    assert line["rollout/live_groups"] == line["train/groups"] == 8 - line["rollout/dead_groups_kept"]
    if truncated == "zero_reward":
        assert line["train/groups"] > 0
    else:  # all 8 were replaced by others, whose rewards are equal as well
        assert (
            line["rollout/replaced_groups"],
            line["rollout/dead_groups_kept"],
            line["rollout/live_groups_frac"],
        ) == (8, 8, 0)
        assert line["train/groups"] == line["train/completion_tokens"] == line["perf/live_groups_per_s"] == 0


class Slow(ScriptedEngine):
    """Takes at least 0.1 s to take weights, and 0.2 s to generate."""

    def _update_weights(self, weights, version):
        time.sleep(0.1)
        super()._update_weights(weights, version)

    def _generate(self, requests):
        time.sleep(0.2)
        return super()._generate(requests)


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_a_steps_phases_follow_each_other(make_run, tmp_path, mini_batches):
    options = {"module_options": {"optimizer_steps_per_batch": mini_batches}}
    run(make_run, 2 * mini_batches, Slow(SCRIPT), more=[StepLog()], run_dir=tmp_path / "log", **options)
    first, second = step_lines(tmp_path / "log")
    assert "time/between_steps_s" not in first
    assert second["time/between_steps_s"] <= second["time"] - first["time"]
    for line in (first, second):
        seconds = {
            name.removeprefix("time/"): value for name, value in line.items() if name.startswith("time/")
        }
        step_s, train_s = seconds.pop("step_s"), seconds.pop("train_s")
        seconds.pop("between_steps_s", None)
        old = {"old_logprobs_s"} if mini_batches > 1 else set()
        training = {"pack_s", "forward_backward_s", "optimizer_s"} | old
        assert set(seconds) == {"sync_s", "rollout_s", "logprob_check_s", "log_s"} | training
        assert seconds["sync_s"] >= 0.1
        assert seconds["rollout_s"] >= 0.2
        # Nothing is counted twice, neither in the step nor in its training.
        assert sum(seconds[name] for name in training) <= train_s
        assert sum(seconds.values()) <= step_s


def test_pilots_leave_filled_and_short_groups_for_training(make_run, tmp_path):
    engine = ScriptedEngine(SCRIPT)
    data = {"tasks_per_step": 40}
    watch, *_ = run(
        make_run,
        2,
        engine,
        more=[StepLog()],
        run_dir=tmp_path / "log",
        rollout_options={"pilot_size": 2},
        data_options=data,
    )
    whole, *_ = run(make_run, 1, ScriptedEngine(SCRIPT), data_options=data)
    for group, full in zip(watch.batches[0].groups, whole.batches[0].groups, strict=True):
        assert group == full if group.is_live else group.completions == full.completions[:2]
    lines = step_lines(tmp_path / "log")
    for batch, line in zip(watch.batches, lines, strict=True):
        assert {(len(group.completions), group.is_live) for group in batch.groups} <= {(2, False), (4, True)}
        assert line["rollout/pilot_filled_frac"] == pytest.approx(
            sum(group.is_live for group in batch.groups) / 40
        )
        assert line["rollout/tokens"] == sum(
            len(c.token_ids) for group in batch.groups for c in group.completions
        )
    assert sum(line["rollout/pilot_filled_frac"] for line in lines) > 0


def test_the_first_box_may_end_a_completion(make_run):
    script = [line + " and more" for line in SCRIPT]
    watch, _, _, error = run(
        make_run,
        2,
        ScriptedEngine(script),
        rollout_options={"sampling": Sampling(max_completion_tokens=32, stop_after_first_box=True)},
    )
    assert error is None
    assert {
        c.finish_reason for batch in watch.batches for group in batch.groups for c in group.completions
    } == {"stop", "length"}
    boxed = [
        c
        for batch in watch.batches
        for group in batch.groups
        for c in group.completions
        if b"boxed" in c.text_bytes
    ]
    assert boxed
    assert all(completion.text_bytes.endswith(b"}") for completion in boxed)
    assert watch.batches[0].sampling.stop_after_first_box


class OnlyTheFirstRankLearns(Reward):
    """Every group of rank 0 has differing rewards, every group of rank 1 equal ones.

    The policy is asked as well, which is a collective.
    """

    needs_logprobs = True

    def group_rewards(self, answered):
        best = 1.0 if torch.distributed.get_rank() == 0 else 0.0
        return (best, *[0.0] * (len(answered.predictions) - 1))


class CountsPrompts(ScriptedEngine):
    """Reports cached prompt tokens for each completion of a prompt of 10 tokens.

    Rank 0 found 6 of 8 shareable tokens in its cache, rank 1 none of 2.
    """

    def _generate(self, requests):
        total, cached, shareable = (10, 6, 8) if torch.distributed.get_rank() == 0 else (10, 0, 2)
        before = self.prompt_tokens or PromptTokens(total=0, cached=0, shareable=0)
        n = sum(request.n for request in requests)
        self.prompt_tokens = PromptTokens(
            total=before.total + n * total,
            cached=before.cached + n * cached,
            shareable=before.shareable + n * shareable,
        )
        return super()._generate(requests)

    def _start(self, model_path, seed):
        super()._start(model_path, seed)
        self.prompt_tokens = PromptTokens(total=0, cached=0, shareable=0)


@pytest.mark.long
def test_two_ranks_draw_together_and_log_what_both_did(make_run, tmp_path):
    """Rank 0 needs no further task, and rank 1 needs four rounds of 4, which is all that the step may draw.

    A rank that draws alone waits for the other until the timeout. Rank 0 fills its 4 groups up to 4
    completions, and rank 1 has 20 groups that stay at the pilot's 2.
    """
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo", timeout=timedelta(seconds=40))
    trainer, module, data = make_run(
        2,
        engine=lambda: CountsPrompts(SCRIPT),
        callbacks=[StepLog()],
        run_dir=tmp_path / "two",
        rollout_options={
            "dynamic_sampling": DynamicSampling(from_step=0, max_factor=3.0),
            "pilot_size": 2,
        },
        devices=2,
        strategy=strategy,
    )
    module.make_optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)  # travels to the other process
    rollout = next(callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback))
    rollout.objective = NextTokenObjective(ContinuationPrompt(), OnlyTheFirstRankLearns())
    trainer.fit(module, data)
    lines = step_lines(tmp_path / "two")
    assert len(lines) == 2
    for line in lines:
        assert line["rollout/replaced_groups"] == 16
        assert line["rollout/dead_groups_kept"] == 4
        assert line["rollout/live_groups"] == 4
        assert line["rollout/live_groups_frac"] == pytest.approx(4 / 24)
        assert line["rollout/all_wrong_frac"] == pytest.approx(20 / 24)
        assert line["rollout/pilot_filled_frac"] == pytest.approx(4 / 24)
        assert line["reward/mean"] == pytest.approx(4 / (24 * 2))
        assert line["rollout/prompt_tokens"] == 10 * (4 * 4 + 20 * 2)
        assert line["rollout/cached_prompt_frac"] == pytest.approx(6 * 16 / 560)
        assert line["rollout/cached_shareable_frac"] == pytest.approx(6 * 16 / (8 * 16 + 2 * 40))


def test_one_callback_trains_and_then_validates(make_run, tmp_path):
    engine = ScriptedEngine(SCRIPT)
    trainer, module, data = make_run(
        1, engine=lambda: engine, data_options={"tasks_per_step": 8, "num_eval_tasks": 8}
    )
    trainer.fit(module, data)
    trainer.limit_val_batches = 1.0
    metrics = trainer.validate(module, data, verbose=False)[0]
    assert engine.events == [
        "start",
        "update 0",
        "generate 8 requests",
        "close",
        "start",
        "update 1",
        "generate 8 requests",
        "close",
    ]
    assert "val/boxed_frac" in metrics


def test_prompts_that_cannot_fit_are_found_before_the_first_step(make_run):
    engine = ScriptedEngine(SCRIPT)
    _, _, _, error = run(make_run, 1, engine, rollout_options={"max_prompt_tokens": 40})
    assert str(error).startswith("--rollout.max_prompt_tokens 40: the longest context of ")
    assert "--data.max_context_tokens" in str(error)
    assert "start" not in engine.events
    cut = int(str(error).rsplit(" ", 1)[1])
    assert (
        run(
            make_run,
            1,
            engine,
            rollout_options={"max_prompt_tokens": 40},
            data_options={"max_context_tokens": cut},
        )[3]
        is None
    )
    trainer, module, data = make_run(1, rollout_options={"max_prompt_tokens": 20}, limit_val_batches=1)
    with pytest.raises(
        ValueError, match=r"--rollout.max_prompt_tokens 20: the longest context of .*, heldout"
    ):
        trainer.validate(module, data, verbose=False)


def test_the_longest_context_is_the_last_stored_position(tiny_task_dir):
    folder = TaskFolder(tiny_task_dir, "train")
    last = max(int(folder.document(index)["positions"].max()) for index in range(len(folder)))
    for max_context_tokens, tokens in ((None, last), (5, 5)):
        data = TokenTaskDataModule(
            str(tiny_task_dir), tasks_per_step=1, max_context_tokens=max_context_tokens
        )
        data.setup("fit")
        assert data.train.last_position == last
        assert data.context_limit("train").tokens == tokens


def test_thought_controls_get_room_where_the_model_has_it(make_run):
    for max_completion_tokens, room in ((32, 64), (1024 - 96 - 10, 10), (1024 - 96, 0)):
        engine = ScriptedEngine(SCRIPT)
        options = {
            "sampling": Sampling(max_completion_tokens=max_completion_tokens),
            "evaluation": Evaluation(thought_controls=True),
        }
        run(make_run, 1, engine, rollout_options=options)
        assert engine.max_model_len == 96 + max_completion_tokens + room


def test_a_factor_below_one_is_refused():
    with pytest.raises(
        ValueError,
        match=r"rollout.dynamic_sampling.max_factor=0\.5: .* --rollout.dynamic_sampling.from_step null",
    ):
        DynamicSampling(max_factor=0.5)
