"""A budget of tokens and tiers through the commands, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.records.results import read_results

OVERLAY = Path(__file__).resolve().parents[2] / "configs" / "rollout" / "thought-budget.yaml"
SMALL = [
    "--config", OVERLAY, "--rollout.max_prompt_tokens", "256", "--rollout.thought_budget.initial", "40",
    "--rollout.thought_budget.steps", "4", "--rollout.sampling.max_completion_tokens", "40",
    "--rollout.thought_budget.decay", "0.75", "--rollout.thought_budget.least", "16",
    "--data.tiers.steps", "4",
]  # fmt: skip


@pytest.fixture(scope="session")
def small(flags, tiny_task_dir):
    """Flags of a small run with tiers of about equal size. A random model is uncertain everywhere."""
    folder = TaskFolder(tiny_task_dir, "train")
    entropy = np.concatenate([folder.document(index)["entropy"] for index in range(len(folder))])
    low, high = np.quantile(entropy, [1 / 3, 2 / 3]).tolist()
    return [*flags, *SMALL, f"--data.tiers.bounds=[{low},{high}]"]


def lines_of(run):
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def test_a_run_from_the_config_then_resumed_validated_and_evaluated(rpt, small, tmp_path, tiny_task_dir):
    run, own = tmp_path / "run", [*small, "--trainer.default_root_dir", tmp_path / "run"]
    status, shown = rpt("fit", *own, "--trainer.max_steps", "2")
    assert status == 0, shown
    status, shown = rpt("fit", *own, "--trainer.max_steps", "4", "--ckpt_path", "last")
    assert status == 0, shown
    # 40 * 0.75^(t/4): 37.2, 34.6, 32.2
    assert [line["rollout/thought_budget"] for line in lines_of(run)] == [40, 37, 34, 32]
    assert yaml.safe_load((run / "config.yaml").read_text())["rollout"]["thought_budget"]["weight"] == 0.1
    (_, *_, last) = sorted((run / "validation").glob("*.jsonl"))
    asked = read_results(last).positions

    # The same weights and positions, outside of the run. The budget on held-out text is 40 * 0.75 = 30.
    status, shown = rpt("validate", *own, "--ckpt_path", "last", "--trainer.limit_val_batches", "1.0")
    assert status == 0, shown
    again = read_results(last).positions
    assert again == asked
    status, shown = rpt(
        "evaluate", "next-token", "--policy", run / "checkpoints" / "step-000004.ckpt", "--task_dir",
        tiny_task_dir, "--engine", "HFEngine", "--engine.dtype", "float32", "--prompt", "ContinuationPrompt",
        "--budget", "30", "--num_tasks", "8", "--max_completion_tokens", "40", "--k", "0", "--accelerator",
        "cpu", "--thought_controls", "false", "--output", tmp_path / "evaluation",
    )  # fmt: skip
    assert status == 0, shown
    (file,) = (tmp_path / "evaluation").rglob("step-*.jsonl")
    evaluated = {row.task_id: row for row in read_results(file).positions}
    for row in asked:
        other = evaluated[row.task_id]
        assert (other.prediction, other.length, other.prompt_tokens) == (
            row.prediction, row.length, row.prompt_tokens,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--rollout.thought_budget.least", "50"], "initial=40, rollout.thought_budget.least=50"),
        (["--rollout.thought_budget.decay=0.01", "--rollout.thought_budget.least=1"], "form of an answer"),
        (["--rollout.thought_budget.initial", "100"], "max_completion_tokens 40"),
        # ln 16 = 2.77 nats is the most that 16 tokens can have.
        (["--data.tiers.bounds=[2.771,3.0]"], "tier 3 of 3 (entropy above 3.0 nats) has no task"),
        (["--data.tiers.first=[1.0]"], "2 bounds make 3 tiers"),
    ],
    ids=["least", "form", "limit", "tier", "probabilities"],
)  # fmt: skip
def test_bad_input_is_one_error_and_leaves_nothing(rpt, small, tmp_path, own, message):
    status, shown = rpt("fit", *small, *own, "--trainer.default_root_dir", tmp_path / "run")
    assert status != 0
    assert message in " ".join(shown.split())
    assert "Traceback" not in shown
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_the_plan_knows_the_prompts(rpt, flags, small):
    lengths = []
    for given in (flags, small):
        status, shown = rpt("plan", *given)
        assert status == 0, shown
        lengths.append(shown)
    assert lengths[0] != lengths[1]
