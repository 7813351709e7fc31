"""The command line as a user meets it: a whole run, a resumed one, and one clear error for each bad input."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
import yaml

from rpt_lightning import cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COMMAND = [sys.executable, "-m", "rpt_lightning.cli"]


@pytest.fixture
def rpt(capfd, caplog, monkeypatch):
    """``rpt(...)`` -> (exit status, everything shown), in this process: a new one takes seconds to import its libraries."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(*args):
        capfd.readouterr()
        caplog.clear()
        try:
            status = cli.main([str(arg) for arg in args])
        except SystemExit as end:  # how parsers end
            status = end.code or 0
        shown = capfd.readouterr()
        return status, shown.out + shown.err + caplog.text  # Lightning's log, which is bound to the first test's stderr

    return run


@pytest.fixture(scope="module")
def flags(tiny_model_dir, tiny_task_dir):
    small = ["--data.tasks_per_step", "8", "--data.num_eval_tasks", "8"]
    return ["--config", CONFIGS / "debug.yaml", "--model.policy.path", tiny_model_dir, "--data.task_dir", tiny_task_dir, *small]


@pytest.fixture(scope="module")
def finished_run(flags, tmp_path_factory):
    """By a process of its own, exactly as a user runs it."""
    run_dir = tmp_path_factory.mktemp("runs") / "debug"
    command = [*COMMAND, "fit", *map(str, flags), "--trainer.default_root_dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir, done.stdout + done.stderr


@pytest.fixture
def run_copy(finished_run, tmp_path):
    return shutil.copytree(finished_run[0], tmp_path / "copy")


def steps_of(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "steps.jsonl").read_text().splitlines()]


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# A whole run


def test_run_folder_holds_everything(finished_run):
    run_dir, output = finished_run
    assert steps_of(run_dir) == [1, 2, 3, 4]
    last = json.loads((run_dir / "steps.jsonl").read_text().splitlines()[-1])
    assert {"reward/mean", "loss/total", "policy/entropy", "optim/grad_norm", "sync/logprob_diff_max"} <= last.keys()
    assert {"time/rollout_s", "time/train_s", "rollout/truncated_frac"} <= last.keys()
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["trainer"]["max_steps"] == 4
    assert checkpoints(run_dir) == ["step-000002.ckpt", "step-000004.ckpt"]
    assert sorted(path.name for path in (run_dir / "validation").glob("*.jsonl")) == ["step-000002.jsonl", "step-000004.jsonl"]
    positions = [json.loads(line) for line in (run_dir / "validation" / "step-000004.jsonl").read_text().splitlines()]
    assert len(positions) == 8
    # null where a position cannot have the control
    assert all(position["empty_thought_correct"] in (True, False, None) for position in positions)
    assert any(type(position["empty_thought_correct"]) is bool for position in positions)
    sample = json.loads((run_dir / "rollouts" / "step-000001.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert sample["completion"].startswith(sample["thought"])
    assert {"context", "truth", "prediction", "reward", "policy_version"} <= set(sample)
    assert yaml.safe_load((run_dir / "tensorboard" / "hparams.yaml").read_text())["rollout"]["group_size"] == 4
    assert "8 contexts (4 from each of 2 documents) x 4 = 32 completions" in output
    assert "engine: transformers" in output
    assert "step 4/4:" in output


def test_no_debris_where_there_is_no_terminal(finished_run):
    _, output = finished_run
    assert "━" not in output
    assert "\x1b[" not in output
    assert "weights_only" not in output


def test_a_bar_on_a_terminal_only(flags, monkeypatch, tmp_path):
    from rpt_lightning.lightning_cli import make_cli

    args = [str(flag) for flag in (*flags, "--trainer.default_root_dir", tmp_path)]
    monkeypatch.setattr(sys, "argv", ["rpt"])
    for is_terminal, expected in ((True, ["StepProgressBar"]), (False, [])):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        trainer = make_cli(run=False, args=args).trainer
        assert [type(callback).__name__ for callback in trainer.callbacks if "Bar" in type(callback).__name__] == expected


def test_a_run_is_not_overwritten_and_can_be_continued(run_copy, flags, rpt):
    common = ["fit", *flags, "--trainer.default_root_dir", run_copy]
    status, output = rpt(*common)
    assert status == 1
    assert "holds a run already (its last checkpoint: step 4); continue it with --ckpt_path last" in output
    assert steps_of(run_copy) == [1, 2, 3, 4]
    status, output = rpt(*common, "--ckpt_path", "last")
    assert status == 1
    assert "did no step" in output
    assert "max_steps=4" in output
    status, output = rpt(
        *common, "--ckpt_path", "last", "--trainer.max_steps", "5", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", run_copy / "csv"
    )
    assert status == 0, output
    assert steps_of(run_copy) == [1, 2, 3, 4, 5]
    (metrics,) = (run_copy / "csv").rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.open()))
    assert any(row["loss/total"] for row in rows)
    assert yaml.safe_load((metrics.parent / "hparams.yaml").read_text())["trainer"]["max_steps"] == 5


def test_going_on_from_an_earlier_checkpoint(run_copy, flags, rpt):
    earlier = run_copy / "checkpoints" / "step-000002.ckpt"
    status, output = rpt("fit", *flags, "--trainer.default_root_dir", run_copy, "--ckpt_path", earlier, "--trainer.max_steps", "3")
    assert status == 0, output
    assert "step-000004.ckpt is beyond step 2, from which the run goes on; it is now step-000004.ckpt.abandoned" in output
    assert checkpoints(run_copy) == ["step-000002.ckpt", "step-000003.ckpt", "step-000004.ckpt.abandoned"]
    assert steps_of(run_copy) == [1, 2, 3]


def test_a_failed_start_does_not_lock_the_folder(flags, rpt, tmp_path):
    run_dir = tmp_path / "run"
    common = ["fit", *flags, "--trainer.default_root_dir", run_dir]
    status, output = rpt(*common, "--rollout.max_prompt_tokens", "4")
    assert status == 1
    (run_dir / "config.yaml").touch()  # there already where the check that failed comes late
    (run_dir / "steps.jsonl").write_text('{"step": 1, "of": "the failed start"}\n')
    status, output = rpt(*common, "--ckpt_path", "last")
    assert status == 1
    assert "leave --ckpt_path out to start this run" in output
    launcher = [*common, "--ckpt_path", "auto", "--trainer.limit_val_batches", "0"]  # starts the same command again and again
    status, output = rpt(*launcher, "--trainer.max_steps", "1")
    assert status == 0, output
    assert "a start that reached no checkpoint: its files are now in failed-start-1/, and the run starts anew" in output
    assert steps_of(run_dir) == [1]
    assert "the failed start" in (run_dir / "failed-start-1" / "steps.jsonl").read_text()
    assert not (run_dir / "config-2.yaml").exists()
    status, output = rpt(*common)
    assert status == 1
    assert "holds a run already" in output
    status, output = rpt(*launcher, "--trainer.max_steps", "2")
    assert status == 0, output
    assert steps_of(run_dir) == [1, 2]


def test_ctrl_c_names_the_last_checkpoint_and_the_way_on(flags, tmp_path):
    run_dir = tmp_path / "run"
    options = ["--trainer.default_root_dir", str(run_dir), "--trainer.max_steps", "1000", "--trainer.limit_val_batches", "0"]
    process = subprocess.Popen(
        [*COMMAND, "fit", *map(str, flags), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        shown = ""
        for line in process.stdout:
            shown += line
            if "step 3/1000" in line:
                break
        process.send_signal(signal.SIGINT)
        shown += process.communicate(timeout=120)[0]
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
    status, output = rpt("validate", *flags, "--model.policy.path", tmp_path / "hf", "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, output
    assert "easy" in output
    assert "Validate metric" not in output  # Lightning's table of the same numbers
    assert (tmp_path / "run" / "validation" / "step-000000.jsonl").is_file()
    assert sorted(path.name for path in (tmp_path / "run").glob("*.yaml")) == ["config-validate.yaml"]


# The command itself


def test_help_and_unknown_command(rpt):
    status, output = rpt("--help")
    assert status == 0
    assert all(word in output for word in ("fit", "validate", "prepare", "export", "report"))
    status, output = rpt("fti")
    assert status == 1
    assert "'fti' is not a command of rpt" in output


def test_the_installed_module_passes_the_exit_status_on():
    assert subprocess.run([*COMMAND, "--version"], capture_output=True).returncode == 0
    assert subprocess.run([*COMMAND, "fti"], capture_output=True).returncode == 1


def test_print_config_needs_no_model_and_no_network(rpt, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, output = rpt("fit", "--config", CONFIGS / "14b.yaml", "--print_config")
    assert status == 0
    printed = yaml.safe_load(output)
    assert printed["rollout"]["group_size"] == 8
    assert printed["model"]["init_args"]["correction"] == "none"  # a default that the file leaves out


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (pickle.UnpicklingError("invalid load key"), "damaged, or is not what its flag asks for: invalid load key"),
        (type("SafetensorError", (Exception,), {})("header too large"), "make or download the model again): header too large"),
        (type("MisconfigurationException", (Exception,), {})("no such device"), "rpt: error: no such device"),
    ],
)
def test_errors_of_libraries_are_one_message(error, expected, rpt, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(cli, "_run_tool", fail)
    status, output = rpt("prepare")
    assert status == 1
    assert expected in output
    assert "Traceback" not in output


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_run_tool", lambda *args: {}["gone"])
    with pytest.raises(KeyError):
        cli.main(["prepare"])


# Bad inputs

BAD = {
    "unknown key": (["--model.polcy.path", "x"], "polcy"),
    "wrong type": (["--trainer.max_steps", "many"], "max_steps"),
    "missing model": (["--model.policy.path", "no/such/folder"], "no/such/folder"),
    "missing task folder": (["--data.task_dir", "no/such/tasks"], "no/such/tasks"),
    "group of one": (["--rollout.group_size", "1"], "group_size=1"),
    "greedy training": (["--rollout.temperature", "0"], "temperature=0"),
    "prompt limit": (["--rollout.max_prompt_tokens", "4"], "max_prompt_tokens"),
    "no checkpoint": (["--ckpt_path", "last"], "there is no checkpoint"),
    "missing checkpoint": (["--ckpt_path", "no/such.ckpt"], "no/such.ckpt: no such file"),
    "unknown prompt version": (["--rollout.objective.prompt", "ChatPrompt", "--rollout.objective.prompt.version", "v9"], "v9"),
    "truncating sampler with correction": (["--rollout.top_p", "0.9", "--model.correction", "truncate"], "top_p=0.9"),
    "too many tasks": (["--data.tasks_per_step", "1000000"], "tasks_per_step"),
    "no engine": (["--rollout.engine", "null"], "rollout.engine"),
    "unknown accelerator": (["--trainer.accelerator", "abacus"], "abacus"),
    "unknown precision": (["--trainer.precision", "7"], "precision"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case, flags, rpt, tmp_path):
    args, expected = BAD[case]
    status, output = rpt("fit", *flags, "--trainer.default_root_dir", tmp_path / "run", *args)
    assert status != 0
    assert expected in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_tokenizer_without_chat_template(flags, tiny_model_dir, rpt, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    chat = ["--rollout.objective.prompt", "ChatPrompt", "--model.policy.path", tmp_path / "model"]
    status, output = rpt("fit", *flags, "--trainer.default_root_dir", tmp_path / "run", *chat)
    assert status == 1
    assert "has no chat template, which ChatPrompt needs" in output


@pytest.mark.parametrize(
    ("config", "model", "data", "other"),
    [
        ("debug.yaml", "NTPModule", "TokenTaskDataModule", "TextDataModule"),
        ("ntp-baseline.yaml", "RPTModule", "TextDataModule", "TokenTaskDataModule"),
    ],
)
def test_model_and_data_that_do_not_fit(config, model, data, other, tiny_model_dir, tiny_task_dir, rpt, tmp_path):
    args = ["--model", model, "--model.policy.path", tiny_model_dir, "--data.task_dir", tiny_task_dir, "--trainer.default_root_dir", tmp_path / "run"]
    status, output = rpt("fit", "--config", CONFIGS / config, *args)
    assert status == 1
    assert f"model={model} and data={data} do not fit together" in output
    assert f"--data {other}" in output
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_cannot_be_used(finished_run, flags, rpt, tmp_path):
    good = (finished_run[0] / "checkpoints" / "step-000004.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for name, expected in (("cut", "can be read"), ("text", "can be read"), ("foreign", "not a checkpoint of `rpt fit`")):
        for verb in ("fit", "validate"):
            status, output = rpt(verb, *flags, "--trainer.default_root_dir", tmp_path / "run", "--ckpt_path", tmp_path / f"{name}.ckpt")
            assert status == 1
            assert expected in output
            assert f"{name}.ckpt" in output


def test_shards_need_a_strategy_with_shards(finished_run, flags, rpt, tmp_path):
    checkpoint = torch.load(finished_run[0] / "checkpoints" / "step-000004.ckpt", weights_only=True)
    folder = tmp_path / "step-000004.ckpt"
    torch.distributed.checkpoint.save({"state_dict": checkpoint.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save({"rpt": checkpoint["rpt"]}, folder / "meta.pt")
    status, output = rpt("fit", *flags, "--trainer.default_root_dir", tmp_path / "run", "--ckpt_path", folder)
    assert status == 1
    assert "it lies in shards, which a strategy without shards does not read; add --config configs/strategy/fsdp2.yaml" in output


def test_checkpoint_of_another_model(finished_run, flags, tiny_model_dir, rpt, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other)).save_pretrained(other)
    checkpoint = finished_run[0] / "checkpoints" / "step-000004.ckpt"
    status, output = rpt("fit", *flags, "--trainer.default_root_dir", tmp_path / "run", "--model.policy.path", other, "--ckpt_path", checkpoint)
    assert status == 1
    assert "weight shapes differ" in output


BAD_PREPARE = {
    "unknown flag": (["--tokeniser", "x"], "tokeniser"),
    "missing tokenizer": (["--tokenizer", "no/such/model"], "--tokenizer 'no/such/model'"),
    "nothing held out": (["--heldout_documents", "0"], "--heldout_documents 0: must be at least 1"),
    "context longer than documents": (["--min_context", "200"], "--max_tokens_per_document 128: leaves nothing"),
    "unknown source": (["--source.class_path", "NoSource"], "NoSource"),
}


@pytest.mark.parametrize("case", BAD_PREPARE)
def test_bad_flags_of_prepare(case, rpt, tmp_path):
    args, expected = BAD_PREPARE[case]
    status, output = rpt("prepare", "--config", CONFIGS / "prepare" / "debug.yaml", "--output_dir", tmp_path / "tasks", *args)
    assert status != 0
    assert expected in output
    assert "Traceback" not in output
    assert not (tmp_path / "tasks").exists()
