"""The command line as a user meets it: a whole run, a resumed one, and one clear error for each bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def rpt(*args, cwd=None):
    result = subprocess.run([sys.executable, "-m", "rpt_lightning.cli", *map(str, args)], capture_output=True, text=True, cwd=cwd)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="module")
def flags(tiny_model_dir, tiny_task_dir):
    return ["--model.policy.path", tiny_model_dir, "--data.task_dir", tiny_task_dir, "--data.tasks_per_step", "8", "--data.num_eval_tasks", "8"]


@pytest.fixture(scope="module")
def finished_run(flags, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "debug"
    status, output = rpt("fit", "--config", CONFIGS / "debug.yaml", "--trainer.default_root_dir", run_dir, *flags)
    assert status == 0, output
    return run_dir, output


def test_run_folder_holds_everything(finished_run):
    run_dir, output = finished_run
    steps = [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    for name in (
        "reward/mean",
        "loss/total",
        "policy/entropy",
        "optim/grad_norm",
        "sync/logprob_diff_max",
        "time/rollout_s",
        "time/train_s",
        "rollout/truncated_frac",
    ):
        assert name in steps[-1]
    assert (run_dir / "config.yaml").is_file()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-000002.ckpt", "step-000004.ckpt"]
    assert sorted(path.name for path in (run_dir / "validation").glob("*.jsonl")) == ["step-000002.jsonl", "step-000004.jsonl"]
    assert len((run_dir / "validation" / "step-000004.jsonl").read_text().splitlines()) == 8
    assert "empty_thought_correct" in (run_dir / "validation" / "step-000004.jsonl").read_text()
    assert list((run_dir / "tensorboard").iterdir())
    assert "8 contexts (4 from each of 2 documents) x 4 = 32 completions" in output
    assert "engine: transformers" in output
    assert "step 4/4:" in output


def test_folder_is_not_overwritten_and_can_be_continued(finished_run, flags):
    run_dir, _ = finished_run
    common = ["fit", "--config", CONFIGS / "debug.yaml", "--trainer.default_root_dir", run_dir, *flags]
    status, output = rpt(*common)
    assert status == 1
    assert "holds a run already" in output
    assert "--ckpt_path last" in output
    status, output = rpt(*common, "--ckpt_path", "last")
    assert status == 1
    assert "did no step" in output
    assert "max_steps=4" in output
    status, output = rpt(*common, "--ckpt_path", "last", "--trainer.max_steps", "5")
    assert status == 0, output
    assert json.loads((run_dir / "steps.jsonl").read_text().splitlines()[-1])["step"] == 5


def test_export_and_validate_the_export(finished_run, flags, tmp_path):
    run_dir, _ = finished_run
    checkpoint = sorted((run_dir / "checkpoints").iterdir())[-1]
    status, output = rpt("export", "--ckpt", checkpoint, "--output", tmp_path / "hf")
    assert status == 0, output
    status, output = rpt(
        "validate", "--config", CONFIGS / "debug.yaml", *flags, "--model.policy.path", tmp_path / "hf", "--trainer.default_root_dir", tmp_path / "run"
    )
    assert status == 0, output
    assert "easy" in output
    assert (tmp_path / "run" / "validation" / "step-000000.jsonl").is_file()


def test_help_and_unknown_command():
    status, output = rpt("--help")
    assert status == 0
    assert all(word in output for word in ("fit", "validate", "prepare", "export"))
    status, output = rpt("fti")
    assert status == 1
    assert "'fti' is not a command of rpt" in output


BAD = {
    "unknown key": (["--model.polcy.path", "x"], "polcy"),
    "wrong type": (["--trainer.max_steps", "many"], "max_steps"),
    "missing model": (["--model.policy.path", "no/such/folder"], "no/such/folder"),
    "missing task folder": (["--data.task_dir", "no/such/tasks"], "no/such/tasks"),
    "group of one": (["--rollout.group_size", "1"], "group_size=1"),
    "greedy training": (["--rollout.temperature", "0"], "temperature=0"),
    "prompt limit": (["--rollout.max_prompt_tokens", "4"], "max_prompt_tokens=4"),
    "no checkpoint": (["--ckpt_path", "last"], "there is no checkpoint"),
    "missing checkpoint": (["--ckpt_path", "no/such.ckpt"], "no/such.ckpt"),
    "no chat template": (["--rollout.objective.prompt", "ChatPrompt", "--rollout.objective.prompt.version", "v9"], "v9"),
    "truncating sampler with correction": (["--rollout.top_p", "0.9", "--model.correction", "truncate"], "top_p=0.9"),
    "too many tasks": (["--data.tasks_per_step", "1000000"], "tasks_per_step"),
    "no engine": (["--rollout.engine", "null"], "rollout.engine"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case, flags, tmp_path):
    args, expected = BAD[case]
    status, output = rpt("fit", "--config", CONFIGS / "debug.yaml", "--trainer.default_root_dir", tmp_path / "run", *flags, *args)
    assert status != 0
    assert expected in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_checkpoint_of_another_model(finished_run, flags, tmp_path):
    run_dir, _ = finished_run
    other = tmp_path / "other"
    other.mkdir()
    model_dir = Path(flags[1])
    for path in model_dir.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    from transformers import AutoConfig, AutoModelForCausalLM

    config["num_hidden_layers"] = 1
    (other / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other)).save_pretrained(other)
    checkpoint = sorted((run_dir / "checkpoints").iterdir())[-1]
    status, output = rpt(
        "fit",
        "--config",
        CONFIGS / "debug.yaml",
        "--trainer.default_root_dir",
        tmp_path / "run",
        *flags,
        "--model.policy.path",
        other,
        "--ckpt_path",
        checkpoint,
    )
    assert status == 1
    assert "weight shapes differ" in output
    assert "Traceback" not in output
