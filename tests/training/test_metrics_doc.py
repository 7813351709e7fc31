"""Every metric that a run logs is registered, and no others are. docs/metrics.md is made of them."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
from async_run import lines_of, make
from small_run import SCRIPT, quiet_trainer

from rpt_lightning.data.modules.text import TextDataModule
from rpt_lightning.metrics.difficulty_bands import BANDS
from rpt_lightning.metrics.metric import Reduction, Section, row
from rpt_lightning.metrics.registry import METRICS, SECTIONS, registered
from rpt_lightning.policy.model import Policy
from rpt_lightning.records.question_results import QuestionResult
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.training.callbacks.answer_results import answer_metrics
from rpt_lightning.training.callbacks.health import Health
from rpt_lightning.training.callbacks.logs import StepLog
from rpt_lightning.training.callbacks.machine_stats import MachineStats
from rpt_lightning.training.checkpoint.callback import RunCheckpoint
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.training.step_clock import StepClock
from rpt_lightning.training.validation.position_records import validation_metrics

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def unregistered(names) -> list[str]:
    return sorted(set(names) - {"step", "time"} - METRICS.keys())


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
    trainer.fit(module, data)
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 2
    assert len(lines[-1]) > 50
    assert unregistered(lines[-1]) == []
    validation = validation_metrics(module.results)
    assert "val/reasoning/all/accuracy" in validation
    assert unregistered(validation) == []


def test_of_next_token_training(tiny_model_dir, tiny_task_dir, tmp_path):
    module = NTPModule(Policy(str(tiny_model_dir)), lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    trainer = quiet_trainer(tmp_path / "run", 2, [RunCheckpoint(), MachineStats(), StepLog()])
    trainer.fit(module, TextDataModule(str(tiny_task_dir), documents_per_step=1))
    line = lines_of(tmp_path / "run")[-1]
    assert "train/target_tokens" in line
    assert unregistered(line) == []


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
    assert unregistered(answer_metrics([result])) == []


def test_nothing_else_is_registered():
    folders = ("algo", "metrics", "objectives", "training")
    source = "".join(
        path.read_text(encoding="utf-8")
        for folder in folders
        for path in sorted((ROOT / "src/rpt_lightning" / folder).rglob("*.py"))
        if "registered" not in path.parts
    )

    def is_logged(name: str) -> bool:
        family, _, last = name.rpartition("/")
        if family == "time" and f'phase("{last.removesuffix("_s")}")' in source:
            return True
        is_of_band = name.split("/")[-2] in ("all", *BANDS)
        ways = [f'/{last}"'] if is_of_band else [f'"{name}"', f'"{name.removeprefix("val/")}"']
        return any(way in source for way in ways)

    assert METRICS
    assert [name for name in METRICS if not is_logged(name)] == []


def test_the_bands_of_a_row_are_registered_one_by_one():
    names = [name for name in METRICS if name.startswith("val/ntp/") and name.endswith("/ceiling")]
    assert names == [f"val/ntp/{band}/ceiling" for band in ("all", *BANDS)]
    (row,) = (
        row for section in SECTIONS for row in section.rows if METRICS["val/ntp/hard/ceiling"] in row.metrics
    )
    assert row.names[-1] == "val/ntp/BAND/ceiling"


def test_an_unregistered_metric_is_an_error():
    assert registered("time/pack_s").name == "time/pack_s"
    for name in ("time/napping_s", "val/ntp/BAND/accuracy", "rollout"):
        with pytest.raises(ValueError, match=f"^{name}: no such metric is registered. Add a row"):
            registered(name)
    clock = StepClock()
    with pytest.raises(ValueError, match="time/napping_s: no such metric"), clock.phase("napping"):
        pass
    assert clock.take() == {}


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import metrics_page

    return metrics_page


def test_the_document_is_made_of_the_registered_metrics(page, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["metrics_page.py", "--check"])
    page.main()
    stale = tmp_path / "stale.md"
    stale.write_text(TEXT.replace("sampled tokens", "drawn tokens"))
    monkeypatch.setattr(page, "DOCUMENT", stale)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"stale.md: not the registered metrics"):
        page.main()
    monkeypatch.setattr(sys, "argv", ["metrics_page.py"])
    page.main()
    assert stale.read_text() == TEXT


def test_a_section_by_hand(page):
    section = Section(
        title="Speed",
        columns=("meaning", "unit", "watch_for"),
        before="Measured.",
        rows=(
            row({"a/b": Reduction.SUM, "a/{band}/c": Reduction.MAX}, meaning="two", unit="s", bands=["easy"]),
            row({"d/e": Reduction.MIN}, meaning="one", normal="not shown", watch_for="a fall"),
        ),
        after="That is all.",
    )
    made = page.page(f"above\n{page.BEGIN}\n{page.END}\nbelow\n", [section])
    assert made.splitlines() == [
        "above",
        page.BEGIN,
        "## Speed",
        "Measured.",
        "",
        "| metric | meaning | unit | warning sign |",
        "|---|---|---|---|",
        "| `a/b`, `a/BAND/c` | two | s | |",
        "| `d/e` | one | | a fall |",
        "",
        "That is all.",
        page.END,
        "below",
    ]


def test_thresholds_of_health_are_its_defaults():
    parameters = inspect.signature(Health.__init__).parameters
    for name in ("window", "min_entropy", "max_equal_groups", "min_length", "max_truncated"):
        assert f"`health.{name}` ({parameters[name].default})" in TEXT
