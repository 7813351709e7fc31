"""The cost of a step, counted independently, and baselines that end at the cost of another run."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from lightning.pytorch import Callback
from small_run import SCRIPT, quiet_trainer

from rpt_lightning.data.modules.text import TextDataModule
from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.policy.flops import ModelSize, model_size
from rpt_lightning.policy.model import Policy
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.settings import DynamicSampling, EngineCheck, Sampling
from rpt_lightning.training.callbacks.budget import Budget
from rpt_lightning.training.callbacks.logs import StepLog
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.checkpoint.callback import RunCheckpoint, last_checkpoint
from rpt_lightning.training.engine_check.logprob_samples import drawn_completions
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.training.modules.rpt_module import RPTModule
from rpt_lightning.types import TrainSequence


class Listener(Callback):
    """Keeps the batches that the steps trained on."""

    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def log(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rpt_run(tiny_model_dir, tiny_task_dir, tmp_path_factory):
    """Two steps by reasoning: (folder, batches, size of the model)."""
    folder, listener = tmp_path_factory.mktemp("runs") / "rpt", Listener()
    rollout = RolloutCallback(
        ScriptedEngine(SCRIPT),
        NextTokenObjective(ContinuationPrompt(), PrefixMatchReward()),
        group_size=4,
        max_prompt_tokens=96,
        sampling=Sampling(max_completion_tokens=32),
        dynamic_sampling=DynamicSampling(from_step=None),
        check=EngineCheck(verify_sequences=3),
    )
    module = RPTModule(Policy(str(tiny_model_dir)), optimizer)
    data = TokenTaskDataModule(str(tiny_task_dir), tasks_per_step=8)
    quiet_trainer(folder, 2, [rollout, StepLog(), listener]).fit(module, data)
    return folder, listener.batches, model_size(module.policy.model)


def text_run(model_dir, task_dir, folder, max_steps, budget, ckpt_path=None):
    module = NTPModule(Policy(str(model_dir)), optimizer)
    trainer = quiet_trainer(folder, max_steps, [RunCheckpoint(every_n_steps=1), budget, StepLog()])
    trainer.fit(
        module, TextDataModule(str(task_dir), documents_per_step=1), ckpt_path=ckpt_path, weights_only=True
    )
    return log(folder)


def pass_flops(size: ModelSize, tokens: int, scored: int) -> float:
    """A causal pass over one sequence."""
    return (
        2 * size.body_params * tokens
        + 2 * size.head_params * scored
        + 4 * size.attention_width * sum(range(1, tokens + 1))
    )


def trie_flops(size: ModelSize, sequences: list[TrainSequence]) -> float:
    """A forward pass in one micro-batch: everything is fed once, with the head at every distinct target."""
    whole = [sequence.prompt_ids + sequence.target_ids for sequence in sequences]
    fed = {ids[:length] for ids in whole for length in range(1, len(ids))}
    scored = {
        ids[:length]
        for ids, one in zip(whole, sequences, strict=True)
        for length in range(len(one.prompt_ids) + 1, len(ids) + 1)
    }
    return sum(
        2 * size.body_params + 4 * size.attention_width * len(prefix) for prefix in fed
    ) + 2 * size.head_params * len(scored)


def test_a_validation_between_two_steps_is_no_part_of_either(make_run, tmp_path):
    validates = {
        "limit_val_batches": 1,
        "val_check_interval": 1,
        "data_options": {"num_eval_tasks": 4, "eval_batch_size": 4},
    }
    scored = []
    for name, options in {"without": {}, "with": validates}.items():
        trainer, module, data = make_run(3, callbacks=[StepLog()], run_dir=tmp_path / name, **options)
        trainer.fit(module, data)
        scored.append([line["cost/scored_tokens"] for line in log(tmp_path / name)])
    assert scored[0] == scored[1]


def test_a_step_by_reasoning_counts_prompts_samples_checks_and_training(rpt_run):
    folder, batches, size = rpt_run
    for entry, batch in zip(log(folder), batches, strict=True):
        groups = batch.rollouts.groups
        sampled = sum(len(completion.token_ids) for group in groups for completion in group.completions)
        prefill = 4 * sum(len(group.prompt_ids) for group in groups)  # this engine has no prefix cache
        assert (entry["rollout/tokens"], entry["rollout/prefill_tokens"]) == (sampled, prefill)
        # The log-prob check reads three completions of all groups behind their prompts. What they share is
        # read once, and last tokens are only targets.
        check = [sample.sequence for sample in drawn_completions(groups, 3, seed=(0, entry["step"] - 1))]
        whole = [sequence.prompt_ids + sequence.target_ids for sequence in check]
        assert entry["cost/scored_tokens"] == len(
            {ids[:length] for ids in whole for length in range(1, len(ids))}
        )
        assert entry["cost/trained_tokens"] == entry["train/packed_tokens"]
        assert (
            entry["cost/tokens"]
            == prefill + sampled + entry["cost/scored_tokens"] + entry["cost/trained_tokens"]
        )
        read = sum(pass_flops(size, len(group.prompt_ids), 0) for group in groups for _ in group.completions)
        # The engine feeds all but the last sampled token. Each attends to the tokens before it and to itself.
        drawn = sum(
            2 * size.body_params + 4 * size.attention_width * (len(group.prompt_ids) + place)
            for group in groups for completion in group.completions
            for place in range(1, len(completion.token_ids))
        ) + 2 * size.head_params * sampled  # fmt: skip
        train = [
            TrainSequence(prompt_ids=group.prompt_ids, target_ids=completion.token_ids)
            for group in groups if group.is_live for completion in group.completions
        ]  # fmt: skip
        assert entry["cost/train_flops"] == pytest.approx(3 * trie_flops(size, train), rel=1e-6)
        assert entry["cost/flops"] == pytest.approx(
            read + drawn + trie_flops(size, check) + 3 * trie_flops(size, train), rel=1e-6
        )
        assert entry["cost/time_s"] >= entry["time/rollout_s"]


@pytest.mark.parametrize(
    ("by", "metric"), [("flops", "cost/flops"), ("tokens", "cost/tokens"), ("time", "cost/time_s")]
)
def test_a_baseline_ends_with_the_step_that_reaches_the_budget(
    rpt_run, tiny_model_dir, tiny_task_dir, tmp_path, by, metric
):
    limit = sum(entry[metric] for entry in log(rpt_run[0]))
    steps = text_run(tiny_model_dir, tiny_task_dir, tmp_path / "ntp", 500, Budget(str(rpt_run[0]), by))
    spent = list(itertools.accumulate(entry[metric] for entry in steps))
    assert spent[-1] >= limit
    assert all(value < limit for value in spent[:-1])
    assert 1 < len(steps) < 500
    assert {"rollout/tokens", "cost/scored_tokens"} & steps[0].keys() == {"cost/scored_tokens"}
    assert steps[0]["cost/tokens"] == steps[0]["cost/trained_tokens"]


def test_a_resumed_baseline_knows_what_it_spent(rpt_run, tiny_model_dir, tiny_task_dir, tmp_path, caplog):
    like = str(rpt_run[0])
    whole = text_run(tiny_model_dir, tiny_task_dir, tmp_path / "whole", 500, Budget(like))
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        text_run(tiny_model_dir, tiny_task_dir, tmp_path / "parts", 2, Budget(like))
    assert "NOT used up" in caplog.text
    parts = text_run(
        tiny_model_dir,
        tiny_task_dir,
        tmp_path / "parts",
        500,
        Budget(like),
        ckpt_path=str(last_checkpoint(tmp_path / "parts")),
    )
    assert [entry["cost/flops"] for entry in parts] == [entry["cost/flops"] for entry in whole]
    again = text_run(
        tiny_model_dir,
        tiny_task_dir,
        tmp_path / "parts",
        500,
        Budget(like),
        ckpt_path=str(last_checkpoint(tmp_path / "parts")),
    )
    assert len(again) == len(whole)  # started again at its end, it costs nothing more


def test_a_run_that_does_not_say_what_it_cost_is_no_budget(tiny_model_dir, tiny_task_dir, tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "cost/flops": 1.0}\n{"step": 2}\n')
    with pytest.raises(ValueError, match="not every step records its cost"):
        text_run(tiny_model_dir, tiny_task_dir, tmp_path / "ntp", 2, Budget(str(tmp_path)))


def test_the_time_left_is_that_of_the_budget():
    """A quarter is spent, and an earlier start spent 5 of these 25 units.

    The other 20 took 10 seconds, so the remaining 75 take 37.5.
    """
    budget = Budget("run")
    budget._limit, budget._spent, budget._spent_before = 100.0, 25.0, 5.0
    assert budget.share_spent == 0.25
    assert budget.seconds_left(10.0) == pytest.approx(37.5)
    budget._spent = 120.0  # the step that reached it
    assert (budget.share_spent, budget.seconds_left(10.0)) == (1.0, 0.0)
    without = Budget()
    assert (without.share_spent, without.seconds_left(10.0)) == (None, float("inf"))
