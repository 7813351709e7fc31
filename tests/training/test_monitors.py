from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from rpt_lightning.training.callbacks.logs import RolloutSamples, StepLog, sample_text
from rpt_lightning.training.step_meter import StepMeter


def start(tmp_path, text, step):
    (tmp_path / "steps.jsonl").write_text(text)
    StepLog().on_train_start(SimpleNamespace(default_root_dir=str(tmp_path), global_step=step), None)
    return [json.loads(line)["step"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()]


def test_half_a_line_at_the_end_of_the_step_log_is_dropped(tmp_path):
    assert start(tmp_path, '{"step": 1}\n{"step": 2}\n{"step": 3, "ti', 2) == [1, 2]
    assert start(tmp_path, '{"step": 1}\n{"step": 2}\n{"step": 3}\n', 2) == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["steps.jsonl"]


def test_a_broken_line_within_the_step_log_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"steps\.jsonl line 1: not a step's metrics"):
        start(tmp_path, '{"ste\n{"step": 2}\n', 2)
    assert (tmp_path / "steps.jsonl").read_text() == '{"ste\n{"step": 2}\n'


@pytest.mark.parametrize("every_n_steps", [0, -1])
def test_samples_of_no_step_are_refused(every_n_steps):
    with pytest.raises(ValueError, match=rf"samples.every_n_steps={every_n_steps}"):
        RolloutSamples(every_n_steps=every_n_steps)


class Wandb(WandbLogger):
    """Keeps what it is given and needs no service."""

    def __init__(self):
        self.texts = []

    def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
        self.texts.append((key, columns, data, step))

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass

    def finalize(self, status):
        pass

    name = version = save_dir = experiment = None


def test_loggers_that_take_text_are_shown_samples_and_others_are_named(make_run, tmp_path, caplog):
    wandb = Wandb()
    trainer, module, data = make_run(
        2, callbacks=[RolloutSamples(every_n_steps=1, num_samples=3)], logger=[wandb, CSVLogger(tmp_path)]
    )
    with caplog.at_level("INFO"):
        trainer.fit(module, data)
    assert [(key, len(rows), step) for key, _, rows, step in wandb.texts] == [
        ("samples", 3, 1),
        ("samples", 3, 2),
    ]
    _, columns, rows, _ = wandb.texts[0]
    assert "prediction" in columns
    assert all(len(row) == len(columns) for row in rows)
    assert sum("CSVLogger accepts no text" in message for message in caplog.messages) == 1
    assert len(list((tmp_path / "run" / "rollouts").iterdir())) == 2


def test_a_line_holds_what_its_step_logged(make_run, tmp_path):
    """Lightning shows the last value of everything that was ever logged."""

    class Sometimes(StepMeter):
        def measure(self, trainer, module):
            return {"time/always_s": 1.0} | ({"time/sometimes_s": 2.0} if trainer.global_step % 2 else {})

    trainer, module, data = make_run(3, callbacks=[StepLog(), Sometimes()])
    trainer.fit(module, data)
    rows = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [("time/always_s" in row, "time/sometimes_s" in row) for row in rows] == [
        (True, True),
        (True, False),
        (True, True),
    ]


def test_every_callback_reads_all_that_the_step_logged_and_adds_nothing_later(make_run, tmp_path):
    """The record holds the loggers' single precision. It is empty when the next step begins."""

    class Reader(StepMeter):
        def __init__(self):
            self.at_start, self.at_end = [], []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.at_start.append(dict(pl_module.step_metrics))

        def measure(self, trainer, module):
            return {"train/tenth": 0.1}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with pytest.raises(RuntimeError, match=r"log_step\(train/late\) comes after .* a StepMeter"):
                pl_module.log_step({"train/late": 1.0})
            self.at_end.append(dict(pl_module.step_metrics))
            shown = {name: value.item() for name, value in trainer.callback_metrics.items()}
            assert {name: shown[name] for name in pl_module.step_metrics} == pl_module.step_metrics

    reader = Reader()
    trainer, module, data = make_run(2, callbacks=[StepLog()])
    trainer.callbacks.insert(0, reader)
    trainer.fit(module, data)
    assert reader.at_start == [{}, {}]
    assert module.step_metrics == {}
    rows = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    for row, record in zip(rows, reader.at_end, strict=True):
        assert record["train/tenth"] == 0.10000000149011612
        assert record == {name: value for name, value in row.items() if name not in ("step", "time")}
        assert "time/step_s" in record


def test_a_metric_keeps_its_place_in_the_lines_of_the_step_log(make_run, tmp_path):
    trainer, module, data = make_run(3, callbacks=[StepLog()])
    trainer.fit(module, data)
    first, *later = [
        list(json.loads(line)) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    ]
    assert first[:2] == ["step", "time"]
    # There is no time since the previous step in the first one.
    assert later == [[*first, "time/between_steps_s"]] * 2


def test_a_completion_stays_text_in_tensorboard():
    from tensorboard.plugin_util import markdown_to_safe_html

    hostile = (
        "a ` ![x](http://evil.example/p.png) [click](http://evil.example)\n\n"
        "<img src='http://evil.example'>\n\n# heading"
    )
    html = markdown_to_safe_html(sample_text({"thought": hostile, "prediction": "b"}))
    assert "<img" not in html
    assert "<a " not in html
    assert "<h1" not in html
    assert html.count("<strong>") == 2
    assert "![x](http://evil.example/p.png)" in html
