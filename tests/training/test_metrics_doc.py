"""docs/metrics.md explains every metric that a run logs, and no others."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from async_run import lines_of, make
from small_run import SCRIPT, quiet_trainer

from rpt_lightning.data.text_datamodule import TextDataModule
from rpt_lightning.metrics.bands import BANDS
from rpt_lightning.metrics.question_results import QuestionResult
from rpt_lightning.policy.model import Policy
from rpt_lightning.rollout.scripted_engine import ScriptedEngine
from rpt_lightning.training.answer_results import answer_metrics
from rpt_lightning.training.checkpoint import RunCheckpoint
from rpt_lightning.training.cost import StepCost
from rpt_lightning.training.health import Health
from rpt_lightning.training.machine_stats import MachineStats
from rpt_lightning.training.monitors import StepLog
from rpt_lightning.training.ntp_module import NTPModule
from rpt_lightning.training.validation import validation_metrics

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
# The first cells of the tables; BAND stands for any band.
EXPLAINED = {
    name
    for line in TEXT.splitlines()
    if line.startswith("|")
    for name in re.findall(r"`(\w+(?:/\w+)+)`", line.split("|")[1])
}


def unexplained(names) -> list[str]:
    return sorted(
        {re.sub(f"/({'|'.join(['all', *BANDS])})/", "/BAND/", name) for name in names}
        - {"step", "time"}
        - EXPLAINED
    )


@pytest.mark.parametrize("staleness", [0, 1])
def test_of_a_run_by_rollouts(make_run, tmp_path, staleness):
    trainer, module, data, _ = make(
        make_run,
        2,
        ScriptedEngine(SCRIPT),
        staleness=staleness,
        more=[MachineStats(peak_flops_per_device=1e12), StepLog()],
        rollout_options={} if staleness else {"pilot_size": 2},
        data_options={"num_eval_tasks": 4, "eval_batch_size": 4},
        limit_val_batches=1,
        val_check_interval=2,
    )
    trainer.callbacks.insert(0, StepCost())
    trainer.fit(module, data)
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 2
    assert len(lines[-1]) > 50
    assert unexplained(lines[-1]) == []
    validation = validation_metrics(module.results)
    assert "val/reasoning/all/accuracy" in validation
    assert unexplained(validation) == []


def test_of_next_token_training(tiny_model_dir, tiny_task_dir, tmp_path):
    module = NTPModule(Policy(str(tiny_model_dir)), lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    trainer = quiet_trainer(tmp_path / "run", 2, [StepCost(), RunCheckpoint(), MachineStats(), StepLog()])
    trainer.fit(module, TextDataModule(str(tiny_task_dir), documents_per_step=1))
    line = lines_of(tmp_path / "run")[-1]
    assert "train/target_tokens" in line
    assert unexplained(line) == []


def test_of_a_validation_on_questions():
    result = QuestionResult(
        question_id="q",
        answer="4",
        category=None,
        prompt_tokens=1,
        verdicts=("right",),
        predictions=("4",),
        lengths=(9,),
        direct_verdict="right",
    )
    assert unexplained(answer_metrics([result])) == []


def test_nothing_else_is_explained():
    folders = ("algo", "metrics", "tasks", "training")
    source = "".join(
        path.read_text(encoding="utf-8")
        for folder in folders
        for path in sorted((ROOT / "src/rpt_lightning" / folder).glob("*.py"))
    )

    def is_logged(name: str) -> bool:
        family, _, last = name.rpartition("/")
        if family == "time" and f'phase("{last.removesuffix("_s")}")' in source:
            return True
        ways = [f'/{last}"'] if "BAND" in name else [f'"{name}"', f'"{name.removeprefix("val/")}"']
        return any(way in source for way in ways)

    assert EXPLAINED
    assert [name for name in sorted(EXPLAINED) if not is_logged(name)] == []


def test_thresholds_of_health_are_its_defaults():
    parameters = inspect.signature(Health.__init__).parameters
    for name in ("window", "min_entropy", "max_equal_groups", "min_length", "max_truncated"):
        assert f"`health.{name}` ({parameters[name].default})" in TEXT
