"""Background rollouts: which batches are trained, by which weights, and what happens at the end."""

from __future__ import annotations

import functools
import threading
import time

import pytest
import torch
from async_run import OBJECTIVE, TASKS, lines_of, make, rollout_of, task_ids, tasks_in_order, versions
from lightning.pytorch import Callback
from real_runs import SomeAreRight
from small_run import SCRIPT

from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import DenseReward
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.engines.hf_engine import HFEngine
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.rollout.settings import Sampling, Selection
from rpt_lightning.training.callbacks.logs import StepLog
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.modules.rpt_module import RPTModule
from rpt_lightning.types import TrainBatch


class ByHand(Callback):
    """The same without a thread and without our callback.

    With ``lag`` 0 it rolls out and trains. With ``lag`` 1 it rolls out the batch that the next step trains.
    """

    def __init__(self, engine, lag, tasks):
        self.engine, self.lag, self.tasks, self.rolled_out = engine, lag, tasks, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.engine.start(pl_module.policy.path, seed=0, max_model_len=128)
            objective = OBJECTIVE.bind(pl_module.tokenizer)
            self.rollouter = Rollouter(
                self.engine,
                objective,
                run_seed=0,
                group_size=4,
                sampling=Sampling(temperature=0.8, max_completion_tokens=32),
            )
        self.engine.update_weights(named_weights(pl_module.policy), version=batch_idx)
        while len(self.rolled_out) <= batch_idx + self.lag:
            self.rolled_out.append(tuple(self.rollouter.rollout(self.tasks[len(self.rolled_out)])))
        batch.rollouts = TrainBatch(groups=self.rolled_out[batch_idx], sampling=self.sampling)


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_weights_are_bit_for_bit_those_of_a_run_without_a_thread(make_run, tmp_path, staleness):
    trainer, module, data, watch = make(make_run, 4, ScriptedEngine(SCRIPT), staleness=staleness)
    sampling = []
    watch.on_train_batch_start = lambda trainer, module, batch, batch_idx: sampling.append(
        batch.rollouts.sampling
    )
    trainer.fit(module, data)
    reference, plain, plain_data, plain_watch = make(
        make_run, 4, ScriptedEngine(SCRIPT), run_dir=tmp_path / "by-hand"
    )
    by_hand = ByHand(ScriptedEngine(SCRIPT), staleness, tasks_in_order(make_run, 6))
    by_hand.sampling = sampling[0]
    reference.callbacks = [
        by_hand if isinstance(callback, RolloutCallback) else callback for callback in reference.callbacks
    ]
    reference.fit(plain, plain_data)
    assert watch.batches == plain_watch.batches
    assert all(torch.equal(one, two) for one, two in zip(watch.weights, plain_watch.weights, strict=True))
    assert versions(watch.batches) == ([{0}, {1}, {2}, {3}] if staleness == 0 else [{0}, {0}, {1}, {2}])
    assert len({weights.sum().item() for weights in watch.weights}) == 5  # every step learned something


class MeetsTraining(ScriptedEngine):
    """Generation and training of neighbouring batches wait for each other.

    Generation of a batch ends only after the training of the one before has begun. That training ends only
    after the generation has begun.
    """

    def __init__(self):
        super().__init__(SCRIPT)
        self.training, self.generation = ([threading.Event() for _ in range(6)] for _ in range(2))
        self.batch = -1

    def _generate(self, requests):
        if len(requests) == TASKS:  # not the requests that are only compared
            self.batch += 1
            self.generation[self.batch].set()
            assert self.batch == 0 or self.training[self.batch - 1].wait(60)
        return super()._generate(requests)


class Meets(Callback):
    def __init__(self, engine, steps):
        self.engine, self.steps = engine, steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.engine.training[batch_idx].set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert batch_idx == self.steps - 1 or self.engine.generation[batch_idx + 1].wait(60)


def test_generation_and_training_run_at_the_same_time(make_run):
    engine = MeetsTraining()
    trainer, module, data, watch = make(make_run, 4, engine, more=[Meets(engine, 4)])
    trainer.fit(module, data)
    assert engine.batch == 3  # and nothing is generated that no step would train
    assert task_ids(watch.batches) == [
        task.task_id for tasks in tasks_in_order(make_run, 4) for task in tasks
    ]


def test_no_batch_is_older_than_allowed_and_tasks_keep_their_order(make_run, tmp_path):
    staleness, more, folder = 3, [StepLog()], tmp_path / "run"
    trainer, module, data, watch = make(
        make_run, 7, ScriptedEngine(SCRIPT), staleness=staleness, more=more, run_dir=folder
    )
    trainer.fit(module, data)
    ages = [line["rollout/staleness"] for line in lines_of(folder)]
    assert [step - age for step, age in enumerate(ages)] == [
        version for (version,) in versions(watch.batches)
    ]
    assert ages[0] == 0
    assert 1 <= max(ages) <= staleness
    assert task_ids(watch.batches) == [
        task.task_id for tasks in tasks_in_order(make_run, 7) for task in tasks
    ]


def test_the_loss_is_weighted_by_how_much_the_policy_has_moved(make_run, tiny_model_dir, tmp_path):
    """Compares with the step's gradient from one sequence at a time and the formula written out.

    The engine's log-probs come from the previous weights.
    """
    cap, lr, folder = 1.01, 2.0, tmp_path / "run"
    options = {
        "module_options": {"correction_cap": cap, "gradient_clip": 0.0},
        "more": [StepLog()],
        "run_dir": folder,
    }
    trainer, module, data, watch = make(make_run, 3, ScriptedEngine(SCRIPT), **options)
    module.make_optimizer = functools.partial(torch.optim.SGD, lr=lr)
    trainer.fit(module, data)
    assert versions(watch.batches)[2] == {1}
    policy = Policy(str(tiny_model_dir))
    policy.materialize()

    def logprobs(group, completion):
        token_ids = group.prompt_ids + completion.token_ids
        logits = (
            policy.model(input_ids=torch.tensor([token_ids])).logits[0, len(group.prompt_ids) - 1 : -1] / 0.8
        )
        return logits.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]

    samples = []
    for group in watch.batches[2]:
        rewards = torch.tensor(group.rewards)
        for completion, advantage in zip(
            group.completions, (rewards - rewards.mean()) / (rewards.std() + 1e-6), strict=True
        ):
            samples.append((group, completion, advantage if group.is_live else 0.0))
    torch.nn.utils.vector_to_parameters(watch.weights[1], policy.parameters())
    with torch.no_grad():
        for group, completion, _ in samples:
            assert (
                logprobs(group, completion) - torch.tensor(completion.rollout_logprobs)
            ).abs().max() < 1e-4
    torch.nn.utils.vector_to_parameters(watch.weights[2], policy.parameters())
    total, raw = torch.zeros(()), []
    for group, completion, advantage in samples:
        if advantage:
            now = logprobs(group, completion)
            raw.append((now - torch.tensor(completion.rollout_logprobs)).exp().detach())
            total = total - advantage * (raw[-1].clamp(max=cap) * now).sum()
    (total / sum(len(completion.token_ids) for _, completion, _ in samples)).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    assert ((watch.weights[2] - watch.weights[3]) / lr - expected).norm() / expected.norm() < 1e-3
    raw, line = torch.cat(raw), lines_of(folder)[2]
    assert line["correction/raw_mean"] == pytest.approx(raw.mean().item(), rel=1e-4)
    assert line["correction/raw_max"] == pytest.approx(raw.max().item(), rel=1e-4)
    assert line["correction/weight_mean"] == pytest.approx(raw.clamp(max=cap).mean().item(), rel=1e-4)
    assert line["correction/above_cap_frac"] == pytest.approx((raw > cap).float().mean().item(), abs=0.01)
    assert 0.05 < (raw > cap).float().mean() < 0.95  # the cap matters for some tokens but not for all
    assert (raw - 1).abs().mean() > 1e-3


class TwoStepsOnce(RPTModule):
    """Announces one optimizer step a batch, but does two on the second batch.

    A module with a stopping criterion may do so.
    """

    def train_batch(self, batch, batch_idx):
        for _ in range(2 if batch_idx == 1 else 1):
            super().train_batch(batch, batch_idx)


def test_rollouts_that_are_too_old_are_dropped_and_counted(make_run, tmp_path):
    engine, folder = ScriptedEngine(SCRIPT), tmp_path / "run"
    trainer, module, data, watch = make(make_run, 5, engine, more=[StepLog()], run_dir=folder)
    module.__class__ = TwoStepsOnce
    with pytest.warns(
        UserWarning,
        match=r"rollouts of version 1 are dropped at version 3 .*TwoStepsOnce does more optimizer steps",
    ):
        trainer.fit(module, data)
    lines = lines_of(folder)
    assert [line["step"] for line in lines] == [1, 3, 4, 5]
    assert [line["rollout/dropped_groups"] for line in lines] == [0, 0, TASKS, 0]
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 0, 1]
    assert versions(watch.batches) == [{0}, {0}, {3}, {3}]
    assert lines[2]["rollout/tokens"] > sum(
        len(c.token_ids) for group in watch.batches[2] for c in group.completions
    )  # dropped rollouts count towards the cost
    assert task_ids(watch.batches) == [
        task.task_id for tasks in tasks_in_order(make_run, 4) for task in tasks
    ]


def test_a_validation_in_between_is_of_the_present_weights(make_run, tmp_path):
    engine = ScriptedEngine(SCRIPT)
    options = {
        "data_options": {"num_eval_tasks": 4, "eval_batch_size": 4},
        "limit_val_batches": 1,
        "val_check_interval": 2,
    }
    trainer, module, data, watch = make(make_run, 4, engine, run_dir=tmp_path / "run", **options)
    trainer.fit(module, data)
    assert versions(watch.batches) == [{0}, {0}, {1}, {2}]
    batch, tried, validation = (f"generate {num} requests" for num in (8, 4, 4))
    assert engine.events == [
        "start", "update 0", batch, batch,
        "update 1", tried, batch,
        "update 2", validation, tried, batch,
        "update 4", validation, "close",
    ]  # fmt: skip


def check_versions_of_logprobs(make_run, tiny_model_dir, engine):
    """Each token's log-prob is that of the weights whose version the completion carries.

    So nothing is shared with the policy, and nothing changes during generation.
    """
    trainer, module, data, watch = make(make_run, 4, engine)
    trainer.fit(module, data)
    policy = Policy(str(tiny_model_dir))
    policy.materialize()
    for step in (2, 3):
        differences = []
        for version in (step - 1, step):
            torch.nn.utils.vector_to_parameters(watch.weights[version], policy.parameters())
            worst = 0.0
            for group in watch.batches[step]:
                for completion in group.completions:
                    assert completion.policy_version == step - 1
                    with torch.no_grad():
                        logits = (
                            policy.model(
                                input_ids=torch.tensor([group.prompt_ids + completion.token_ids])
                            ).logits[0]
                            / 0.8
                        )
                    logprobs = logits[len(group.prompt_ids) - 1 : -1].log_softmax(-1)
                    found = logprobs.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
                    worst = max(worst, (found - torch.tensor(completion.rollout_logprobs)).abs().max().item())
            differences.append(worst)
        assert differences[0] < 1e-3 < 10 * 1e-3 < differences[1]


def test_transformers_engine_beside_the_training(make_run, tiny_model_dir):
    check_versions_of_logprobs(make_run, tiny_model_dir, HFEngine(dtype="float32", device="cpu"))


@pytest.mark.vllm
@pytest.mark.long
def test_vllm_engine_beside_the_training(make_run, tiny_model_dir):
    check_versions_of_logprobs(
        make_run, tiny_model_dir, VLLMEngine(dtype="float32", kv_cache_gib=0.1, max_num_seqs=16)
    )


@pytest.mark.parametrize(
    ("staleness", "module_options", "reward", "message"),
    [
        (
            1,
            {"correction": "none"},
            SomeAreRight(),
            r"--rollout.max_staleness 1: .* --model.correction truncate",
        ),
        (
            1,
            {"optimizer_steps_per_batch": 2},
            SomeAreRight(),
            r"--rollout.max_staleness 1: with --model.optimizer_steps_per_batch 2 .* give 2 or more",
        ),
        (1, {}, DenseReward(), r"--rollout.max_staleness 1: DenseReward asks the policy"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_first_step(
    make_run, staleness, module_options, reward, message
):
    engine = ScriptedEngine(SCRIPT)
    trainer, module, data, _ = make(make_run, 1, engine, staleness=staleness, module_options=module_options)
    rollout_of(trainer).objective = NextTokenObjective(ContinuationPrompt(), reward)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, data)
    assert "start" not in engine.events
    with pytest.raises(ValueError, match=r"rollout\.max_staleness=-1: "):
        RolloutCallback(max_staleness=-1)


def test_a_data_module_that_still_hands_out_tasks_is_an_error(make_run):
    trainer, module, data, _ = make(make_run, 1, ScriptedEngine(SCRIPT), staleness=1)
    data._next_batch = data.next_batch  # as a user's own train_dataloader might do
    with pytest.raises(ValueError, match=r"max_staleness=1: TokenTaskDataModule puts 8 tasks into a batch"):
        trainer.fit(module, data)


@pytest.mark.parametrize("selection", [Selection(max_true_prob=0.8), Selection(by_kind=True)])
def test_a_policy_that_trains_cannot_select_tasks(make_run, selection):
    engine = ScriptedEngine(SCRIPT)
    options = {"rollout_options": {"selection": selection}}
    trainer, module, data, _ = make(make_run, 1, engine, **options)
    with pytest.raises(
        ValueError,
        match=r"--rollout.max_staleness 1: rollout.selection asks the policy .*--rollout.max_staleness 0",
    ):
        trainer.fit(module, data)
    assert "start" not in engine.events


class Latency(ScriptedEngine):
    def _generate(self, requests):
        time.sleep(2.0 if len(requests) == TASKS else 0.0)
        return super()._generate(requests)


class SlowTraining(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(2.0)


@pytest.mark.long
def test_a_step_takes_as_long_as_the_longer_of_generation_and_training(make_run, tmp_path):
    folder = tmp_path / "run"
    trainer, module, data, _ = make(
        make_run, 8, Latency(SCRIPT), more=[StepLog(), SlowTraining()], run_dir=folder
    )
    trainer.fit(module, data)
    lines = lines_of(folder)[1:-1]  # the first step waits for its own rollouts, the last has none beside it
    step_s = sum(line["time/step_s"] + line["time/between_steps_s"] for line in lines) / len(lines)
    generation_s, training_s = (
        sum(line[name] for line in lines) / len(lines) for name in ("time/generation_s", "time/train_s")
    )
    ratio = step_s / max(generation_s, training_s)
    print(
        f"generation {generation_s:.2f} s, training {training_s:.2f} s, a step {step_s:.2f} s: "
        f"{ratio:.3f} of the longer one"
    )
    assert ratio < 1.1
