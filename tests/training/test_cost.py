"""What a step costs, counted independently, and baselines that end at the cost of another run."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from lightning.pytorch import Callback
from small_run import SCRIPT, quiet_trainer

from rpt_lightning.data.datamodule import TokenTaskDataModule
from rpt_lightning.data.text_datamodule import TextDataModule
from rpt_lightning.metrics.flops import num_matrix_params
from rpt_lightning.policy.model import Policy
from rpt_lightning.rollout.scripted_engine import ScriptedEngine
from rpt_lightning.tasks.objective import Objective
from rpt_lightning.tasks.prompt import ContinuationPrompt
from rpt_lightning.tasks.reward import PrefixMatchReward
from rpt_lightning.training.checkpoint import RunCheckpoint, last_checkpoint
from rpt_lightning.training.cost import Budget, StepCost
from rpt_lightning.training.module import RPTModule
from rpt_lightning.training.monitors import StepLog
from rpt_lightning.training.ntp_module import NTPModule
from rpt_lightning.training.rollout_callback import RolloutCallback


class Listener(Callback):
    """What the steps were trained on."""

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
    """Two steps by reasoning: (folder, batches, parameters)."""
    folder, listener = tmp_path_factory.mktemp("runs") / "rpt", Listener()
    rollout = RolloutCallback(
        ScriptedEngine(SCRIPT),
        Objective(ContinuationPrompt(), PrefixMatchReward()),
        group_size=4,
        max_prompt_tokens=96,
        max_completion_tokens=32,
        dynamic_sampling_from_step=None,
        verify_sequences=3,
    )
    module = RPTModule(Policy(str(tiny_model_dir)), optimizer)
    data = TokenTaskDataModule(str(tiny_task_dir), tasks_per_step=8)
    quiet_trainer(folder, 2, [StepCost(), rollout, StepLog(), listener]).fit(module, data)
    return folder, listener.batches, num_matrix_params(module.policy.model)


def text_run(model_dir, task_dir, folder, max_steps, budget, ckpt_path=None):
    module = NTPModule(Policy(str(model_dir)), optimizer)
    trainer = quiet_trainer(folder, max_steps, [StepCost(), RunCheckpoint(every_n_steps=1), budget, StepLog()])
    trainer.fit(module, TextDataModule(str(task_dir), documents_per_step=1), ckpt_path=ckpt_path, weights_only=True)
    return log(folder)


def test_a_step_by_reasoning_counts_prompts_samples_checks_and_training(rpt_run):
    folder, batches, params = rpt_run
    for entry, batch in zip(log(folder), batches, strict=True):
        groups = batch["rollouts"].groups
        sampled = sum(len(completion.token_ids) for group in groups for completion in group.completions)
        prefill = 4 * sum(len(group.prompt_ids) for group in groups)  # this engine has no prefix cache
        assert (entry["rollout/tokens"], entry["rollout/prefill_tokens"]) == (sampled, prefill)
        # The check of log-probs reads one prompt and three completions, whose last tokens are only targets.
        checked = groups[0].completions[:3]
        trie = {completion.token_ids[:length] for completion in checked for length in range(1, len(completion.token_ids))}
        trie -= {completion.token_ids for completion in checked if not any(completion.token_ids == prefix for prefix in trie)}
        assert entry["cost/scored_tokens"] == len(groups[0].prompt_ids) + len(trie)
        assert entry["cost/trained_tokens"] == entry["train/packed_tokens"]
        assert entry["cost/tokens"] == prefill + sampled + entry["cost/scored_tokens"] + entry["cost/trained_tokens"]
        forward = prefill + sampled + entry["cost/scored_tokens"]
        assert entry["cost/flops"] == pytest.approx(params * (2 * forward + 6 * entry["cost/trained_tokens"]))
        assert entry["cost/time_s"] >= entry["time/rollout_s"]


def test_parameters_are_those_of_matrices(tiny_model_dir):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    tied = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert num_matrix_params(tied) == sum(parameter.numel() for parameter in tied.parameters())
    sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    untied = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    # q and o 8 x 8, k and v 8 x 4; three 8 x 6 of the MLP; three norms of 8; the head 10 x 8, and no input embedding.
    assert num_matrix_params(untied) == 2 * 64 + 2 * 32 + 3 * 48 + 3 * 8 + 80


@pytest.mark.parametrize(("by", "metric"), [("flops", "cost/flops"), ("tokens", "cost/tokens"), ("time", "cost/time_s")])
def test_a_baseline_ends_with_the_step_that_reaches_the_budget(rpt_run, tiny_model_dir, tiny_task_dir, tmp_path, by, metric):
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
    parts = text_run(tiny_model_dir, tiny_task_dir, tmp_path / "parts", 500, Budget(like), ckpt_path=str(last_checkpoint(tmp_path / "parts")))
    assert [entry["cost/flops"] for entry in parts] == [entry["cost/flops"] for entry in whole]


def test_a_run_that_does_not_say_what_it_cost_is_no_budget(tiny_model_dir, tiny_task_dir, tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "cost/flops": 1.0}\n{"step": 2}\n')
    with pytest.raises(ValueError, match="not every step says what it cost"):
        text_run(tiny_model_dir, tiny_task_dir, tmp_path / "ntp", 2, Budget(str(tmp_path)))
