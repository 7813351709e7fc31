"""The command line as a user meets it: a whole run, a resumed one, an interrupted one."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

COMMAND = [sys.executable, "-m", "rpt_lightning.cli"]


def steps_of(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "steps.jsonl").read_text().splitlines()]


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_run_folder_holds_everything(finished_run):
    run_dir, output = finished_run
    assert steps_of(run_dir) == [1, 2, 3, 4]
    last = json.loads((run_dir / "steps.jsonl").read_text().splitlines()[-1])
    assert {
        "reward/mean",
        "loss/total",
        "policy/entropy",
        "optim/grad_norm",
        "sync/logprob_diff_max",
    } <= last.keys()
    assert {"time/rollout_s", "time/train_s", "rollout/truncated_frac"} <= last.keys()
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["trainer"]["max_steps"] == 4
    assert checkpoints(run_dir) == ["step-000002.ckpt", "step-000004.ckpt"]
    assert sorted(path.name for path in (run_dir / "validation").glob("*.jsonl")) == [
        "step-000002.jsonl",
        "step-000004.jsonl",
    ]
    positions = [
        json.loads(line) for line in (run_dir / "validation" / "step-000004.jsonl").read_text().splitlines()
    ]
    assert len(positions) == 8
    # null where a position cannot have the control
    assert all(position["empty_thought_correct"] in (True, False, None) for position in positions)
    assert any(type(position["empty_thought_correct"]) is bool for position in positions)
    sample = json.loads(
        (run_dir / "rollouts" / "step-000001.jsonl").read_text(encoding="utf-8").splitlines()[0]
    )
    assert sample["completion"].startswith(sample["thought"])
    assert {"context", "truth", "prediction", "reward", "policy_version"} <= set(sample)
    assert (
        yaml.safe_load((run_dir / "tensorboard" / "hparams.yaml").read_text())["rollout"]["group_size"] == 4
    )
    assert "8 contexts (4 from each of 2 documents) x 4 = 32 completions" in output
    assert "engine: transformers" in output
    assert "step 4/4:" in output


def test_no_debris_where_there_is_no_terminal(finished_run):
    _, output = finished_run
    assert "━" not in output
    assert "\x1b[" not in output
    assert "weights_only" not in output


@pytest.mark.long
def test_further_ranks_are_started_by_the_installed_command(flags, installed, tmp_path):
    """Lightning starts them with ``sys.argv``.

    Every other test with ranks uses ``python -m`` or torchrun.
    """
    devices = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--trainer.max_steps",
        "1",
    ]
    command = [
        installed,
        "fit",
        *map(str, flags),
        *devices,
        "--trainer.default_root_dir",
        str(tmp_path),
        "--trainer.limit_val_batches",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps_of(tmp_path) == [1]


def test_no_pass_makes_inference_tensors(flags, tmp_path):
    """Inference tensors cannot be gathered from shards.

    Lightning avoids them with gloo, so no run on a CPU would show the problem.
    """
    from rpt_lightning.cli.run import make_cli
    from rpt_lightning.evaluation.policies import evaluation_trainer

    args = [str(flag) for flag in (*flags, "--trainer.default_root_dir", tmp_path)]
    evaluation = evaluation_trainer(tmp_path, [], ckpt_path=None, precision="32-true", accelerator="cpu")
    assert [
        trainer.validate_loop.inference_mode
        for trainer in (make_cli(run=False, args=args).trainer, evaluation)
    ] == [False, False]


def test_a_bar_on_a_terminal_only(flags, monkeypatch, tmp_path):
    from rpt_lightning.cli.run import make_cli

    args = [str(flag) for flag in (*flags, "--trainer.default_root_dir", tmp_path)]
    monkeypatch.setattr(sys, "argv", ["rpt"])
    for is_terminal, expected in ((True, ["StepProgressBar"]), (False, [])):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        trainer = make_cli(run=False, args=args).trainer
        assert [
            type(callback).__name__ for callback in trainer.callbacks if "Bar" in type(callback).__name__
        ] == expected


def test_a_run_is_not_overwritten_and_can_be_continued(run_copy, flags, rpt):
    common = ["fit", *flags, "--trainer.default_root_dir", run_copy]
    status, output = rpt(*common)
    assert status == 1
    assert "already holds a run (its last checkpoint: step 4); continue it with --ckpt_path last" in output
    assert steps_of(run_copy) == [1, 2, 3, 4]
    status, output = rpt(*common, "--ckpt_path", "last")
    assert status == 1
    assert "did no step" in output
    assert "max_steps=4" in output
    status, output = rpt(*common, "--ckpt_path", "auto")  # the last of a chain of jobs
    assert status == 0, output
    assert "the run is complete: it is at step 4, and nothing is left to do" in output
    status, output = rpt(
        *common,
        "--ckpt_path",
        "last",
        "--trainer.max_steps",
        "5",
        "--trainer.logger",
        "CSVLogger",
        "--trainer.logger.save_dir",
        run_copy / "csv",
    )
    assert status == 0, output
    assert steps_of(run_copy) == [1, 2, 3, 4, 5]
    (metrics,) = (run_copy / "csv").rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.open()))
    assert any(row["loss/total"] for row in rows)
    assert yaml.safe_load((metrics.parent / "hparams.yaml").read_text())["trainer"]["max_steps"] == 5


def records_of_validation(run_dir):
    return {path.name for path in (run_dir / "validation").iterdir()}


def test_going_on_from_an_earlier_checkpoint(run_copy, flags, rpt):
    earlier, lower = run_copy / "checkpoints" / "step-000002.ckpt", ["--model.optimizer.lr", "1e-5"]
    status, output = rpt(
        "fit",
        *flags,
        "--trainer.default_root_dir",
        run_copy,
        "--ckpt_path",
        earlier,
        "--trainer.max_steps",
        "3",
        *lower,
    )
    assert status == 0, output
    assert "optimizer, as given from here on: lr 1e-05" in output
    assert json.loads((run_copy / "steps.jsonl").read_text().splitlines()[-1])["optim/lr"] == pytest.approx(
        1e-5
    )
    assert (
        "the run resumes from step 2; files of later steps are now named *.abandoned: "
        "checkpoints/step-000004.ckpt, validation/step-" in output
    )
    assert checkpoints(run_copy) == ["step-000002.ckpt", "step-000003.ckpt", "step-000004.ckpt.abandoned"]
    assert steps_of(run_copy) == [1, 2, 3]
    for name in ("validation", "rollouts"):  # of steps that are made anew
        records = {path.name for path in (run_copy / name).iterdir()}
        assert not any(
            record.startswith("step-000004") and not record.endswith(".abandoned") for record in records
        )
    assert "step-000004.jsonl.abandoned" in records_of_validation(run_copy)


def test_a_failed_start_does_not_lock_the_folder(flags, rpt, tmp_path):
    run_dir = tmp_path / "run"
    common = ["fit", *flags, "--trainer.default_root_dir", run_dir]
    status, output = rpt(*common, "--rollout.max_prompt_tokens", "4")
    assert status == 1
    (run_dir / "config.yaml").touch()  # there already where the check that failed comes late
    (run_dir / "steps.jsonl").write_text('{"step": 1, "of": "the failed start"}\n')
    (run_dir / "validation").mkdir()
    for step in (0, 2):  # of `rpt validate` before the run, and of the failed start
        (run_dir / "validation" / f"step-{step:06d}.jsonl").write_text("{}\n")
    status, output = rpt(*common, "--ckpt_path", "last")
    assert status == 1
    assert "leave --ckpt_path out to start this run" in output
    launcher = [
        *common,
        "--ckpt_path",
        "auto",
        "--trainer.limit_val_batches",
        "0",
    ]  # starts the same command again and again
    status, output = rpt(*launcher, "--trainer.max_steps", "1")
    assert status == 0, output
    assert (
        "a start that reached no checkpoint: its files are now in failed-start-1/, and the run starts anew"
        in output
    )
    assert steps_of(run_dir) == [1]
    assert "the failed start" in (run_dir / "failed-start-1" / "steps.jsonl").read_text()
    assert (run_dir / "validation" / "step-000000.jsonl").read_text() == "{}\n"
    assert [path.name for path in (run_dir / "failed-start-1" / "validation").iterdir()] == [
        "step-000002.jsonl"
    ]
    assert not (run_dir / "config-2.yaml").exists()
    status, output = rpt(*common)
    assert status == 1
    assert "already holds a run" in output
    status, output = rpt(*launcher, "--trainer.max_steps", "2")
    assert status == 0, output
    assert steps_of(run_dir) == [1, 2]


def test_ctrl_c_names_the_last_checkpoint_and_the_way_on(flags, tmp_path):
    run_dir = tmp_path / "run"
    options = [
        "--trainer.default_root_dir",
        str(run_dir),
        "--trainer.max_steps",
        "1000",
        "--trainer.limit_val_batches",
        "0",
    ]
    process = subprocess.Popen(
        [*COMMAND, "fit", *map(str, flags), *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    try:
        shown = ""
        for line in process.stdout:
            shown += line
            if "step 3/1000" in line:
                break
        process.send_signal(signal.SIGINT)
        try:
            shown += process.communicate(timeout=120)[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # it says where each thread stands
            pytest.fail(shown + process.communicate(timeout=20)[0])
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    last = checkpoints(run_dir)[-1]
    assert "stopped at step" in shown
    assert f"{last}: continue with --ckpt_path last" in shown
    assert "Traceback" not in shown


def test_export_and_validate_the_export(finished_run, flags, rpt, tmp_path):
    run_dir, _ = finished_run
    checkpoint = sorted((run_dir / "checkpoints").iterdir())[-1]
    status, output = rpt("export", "--ckpt", checkpoint, "--output", tmp_path / "hf")
    assert status == 0, output
    status, output = rpt(
        "validate",
        *flags,
        "--model.policy.path",
        tmp_path / "hf",
        "--trainer.default_root_dir",
        tmp_path / "run",
    )
    assert status == 0, output
    assert "easy" in output
    assert "Validate metric" not in output  # Lightning's table of the same numbers
    assert (tmp_path / "run" / "validation" / "step-000000.jsonl").is_file()
    assert sorted(path.name for path in (tmp_path / "run").glob("*.yaml")) == ["config-validate.yaml"]
