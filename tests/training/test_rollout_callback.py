"""The order of a step, and what stops it: an engine that does not hold the policy's weights is found before anything is trained on its completions."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import Callback
from small_run import SCRIPT, flat_weights

from rpt_lightning.rollout.engine import Sample
from rpt_lightning.rollout.scripted_engine import ScriptedEngine
from rpt_lightning.tasks.objective import Objective
from rpt_lightning.tasks.prompt import ContinuationPrompt
from rpt_lightning.tasks.reward import ConditionalDenseReward, DenseReward
from rpt_lightning.training.rollout_callback import RolloutCallback
from rpt_lightning.training.sync_check import SyncError


class Watch(Callback):
    """Keeps every batch's rollouts and the weights after every step."""

    def __init__(self):
        self.batches, self.weights = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch["rollouts"])
        self.weights.append(flat_weights(pl_module))


def run(make_run, steps, engine, **options):
    watch = Watch()
    trainer, module, data = make_run(steps, engine=lambda: engine, callbacks=[watch], **options)
    error = None
    try:
        trainer.fit(module, data)
    except (SyncError, ValueError) as raised:
        error = raised
    return watch, module, data, error


def test_weights_go_in_before_every_rollout(make_run):
    engine = ScriptedEngine(SCRIPT)
    watch, *_ = run(make_run, 3, engine)
    assert engine.events == [
        "start", "update 0", "generate 8 requests", "update 1", "generate 8 requests", "update 2", "generate 8 requests", "close",
    ]  # fmt: skip
    for step, batch in enumerate(watch.batches):
        assert len(batch.groups) == 8
        assert {completion.policy_version for group in batch.groups for completion in group.completions} == {step}


class StaleAfterFirst(ScriptedEngine):
    """Acknowledges every update and keeps the weights of the first: one real optimizer step behind from step 2 on."""

    def _update_weights(self, weights, version):
        if version == 0:
            super()._update_weights(weights, version)
        else:
            for _ in weights:
                pass


class WrongLogprobs(ScriptedEngine):
    """Holds the right weights and computes something else from step 2 on, as a wrong temperature or a stale cache would."""

    def _generate(self, requests):
        samples = super()._generate(requests)
        if self.version == 0:
            return samples
        return [[Sample(s.token_ids, tuple(logprob * 1.25 for logprob in s.logprobs)) for s in row] for row in samples]


@pytest.mark.parametrize(
    ("engine_class", "message"), [(StaleAfterFirst, "compared tensors differ"), (WrongLogprobs, "log-probs of engine and policy")]
)
def test_engine_that_is_not_the_policy_stops_the_run(make_run, tmp_path, engine_class, message):
    engine = engine_class(SCRIPT)
    watch, module, _, error = run(make_run, 5, engine)
    assert isinstance(error, SyncError)
    assert message in str(error)
    assert len(watch.weights) == 1  # step 1 was honest; nothing was trained afterwards
    assert torch.equal(flat_weights(module), watch.weights[0])
    assert engine.events[-1] == "close"


def test_dynamic_sampling_replaces_and_counts(make_run, tmp_path):
    engine = ScriptedEngine(SCRIPT)
    watch, _, data, _ = run(make_run, 2, engine, rollout_options={"dynamic_sampling_from_step": 1, "dynamic_sampling_max_factor": 3.0})
    first, second = watch.batches
    assert len(first.groups) == len(second.groups) == 8
    assert sum(group.is_live for group in second.groups) > sum(group.is_live for group in first.groups)
    ids = [group.task.task_id for batch in watch.batches for group in batch.groups]
    assert len(set(ids)) == len(ids)
    rolled_out = sum(int(event.split()[1]) for event in engine.events if event.startswith("generate"))
    assert data.stream.state_dict()["index"] == rolled_out  # the cursor counts every task once


@pytest.mark.parametrize("reward", [DenseReward(), ConditionalDenseReward()])
def test_dense_rewards_are_the_policys_own_probabilities(make_run, reward):
    engine = ScriptedEngine(SCRIPT)
    watch = Watch()
    trainer, module, data = make_run(1, engine=lambda: engine, callbacks=[watch])
    rollout = next(callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback))
    rollout.objective = Objective(ContinuationPrompt(), reward)
    module.policy.materialize()
    start = module.policy.model.state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    trainer.fit(module, data)
    module.policy.model.load_state_dict(start)
    checked = 0
    for group in watch.batches[0].groups:
        logits = module.policy.model(input_ids=torch.tensor([group.task.context_ids])).logits[0, -1]
        for prediction, paid in zip(group.predictions, group.rewards, strict=True):
            right = prediction is not None and prediction.startswith(group.task.continuation[0])
            if prediction is None or right or paid == 0.0:
                continue
            first = module.tokenizer(prediction.decode(), add_special_tokens=False)["input_ids"][0]
            assert paid == pytest.approx(logits.softmax(-1)[first].item(), rel=1e-3)
            checked += 1
    assert checked > 3 or isinstance(reward, ConditionalDenseReward)


def test_step_log_counts_truncated_and_replaced(make_run, tmp_path):
    from rpt_lightning.training.monitors import StepLog

    trainer, module, data = make_run(3, callbacks=[StepLog()], run_dir=tmp_path / "log")
    trainer.fit(module, data)
    lines = [json.loads(line) for line in (tmp_path / "log" / "steps.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert sum(line["rollout/truncated_frac"] for line in lines) > 0  # one line of the script never ends in time
    assert all(line["rollout/replaced_groups"] == 0 for line in lines)
    assert all(line["rollout/boxed_frac"] < 1 for line in lines)
