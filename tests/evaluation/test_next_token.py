"""`rpt evaluate next-token` from the command line, on the tiny model with transformers' engine."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rpt_lightning import cli
from rpt_lightning.pretrained.token_bytes import start_ids
from rpt_lightning.records.results import read_results

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAINING = Path(__file__).resolve().parents[1] / "training"
SMALL = [
    "--num_tasks",
    "12",
    "--max_completion_tokens",
    "8",
    "--max_context_tokens",
    "40",
    "--accelerator",
    "cpu",
]
REASONING = [
    "--engine",
    "HFEngine",
    "--engine.dtype",
    "float32",
    "--prompt",
    "ContinuationPrompt",
    "--k",
    "4",
    "--temperature",
    "1.0",
]


@pytest.fixture
def rpt(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))

    def run(*args):
        capfd.readouterr()
        status = cli.main([str(arg) for arg in args])
        shown = capfd.readouterr()
        return status, shown.out + shown.err

    return run


def test_one_policy_and_then_another_against_it(rpt, tiny_model_dir, tiny_task_dir, tiny_tokenizer, tmp_path):
    common = ["evaluate", "next-token", "--task_dir", tiny_task_dir, *SMALL]
    status, output = rpt(*common, "--policy", tiny_model_dir, *REASONING, "--output", tmp_path / "one")
    assert status == 0, output
    path = tmp_path / "one" / "tiny" / "validation" / "step-000000.jsonl"
    results = read_results(path)
    assert len(results.positions) == 12
    assert results.temperature == 1.0
    for position in results.positions:
        assert position.context_tokens == min(40, position.position) + len(start_ids(tiny_tokenizer))
        assert position.prompt_tokens > position.context_tokens  # the prompt adds the template's tokens
        assert position.num_samples == 4
        assert 0 <= position.num_correct <= 4
        assert 4 <= position.sampled_tokens <= 32
        assert position.token_kind is not None
    for row in (
        "reasoning accuracy",
        "avg@n",
        "pass@4",
        "hard only (entropy > 1.5): reasoning",
        "FLOPs by reasoning",
        "with a shuffled thought",
    ):
        assert f"| {row} |" in output
    assert (tmp_path / "one" / "summary.md").read_text() in output

    status, output = rpt(
        *common,
        "--policy",
        tiny_model_dir,
        "--against",
        tmp_path / "one" / "tiny",
        "--output",
        tmp_path / "two",
    )
    assert status == 0, output
    assert "NTP tiny - NTP" in output
    assert "+0.0 points" in output  # the same weights
    again = read_results(tmp_path / "two" / "tiny" / "validation" / "step-000000.jsonl")
    assert [p.ntp_correct for p in again.positions] == [p.ntp_correct for p in results.positions]
    assert again.positions[0].reasoning_correct is None
    assert results.model_size == again.model_size is not None

    # Other positions are refused before any policy is asked.
    few = [
        "--num_tasks",
        "6",
        "--policy",
        tiny_model_dir,
        "--against",
        tmp_path / "one" / "tiny",
        "--output",
        tmp_path / "three",
    ]
    status, output = rpt(*common, *few)
    assert status == 1
    assert (
        f"--against {tmp_path / 'one' / 'tiny'}: these are results at other positions (12) than the 6 "
        "asked here" in output
    )
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "HFEngine"], "--prompt is not set"),
        (["--prompt", "ContinuationPrompt"], "--engine is not set"),
        (["--against", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_bad_flags_are_one_clear_error(rpt, tiny_model_dir, tiny_task_dir, tmp_path, flags, message):
    status, output = rpt(
        "evaluate",
        "next-token",
        "--policy",
        tiny_model_dir,
        "--task_dir",
        tiny_task_dir,
        "--output",
        tmp_path / "new",
        *flags,
    )
    assert status == 1
    assert message in output
    assert not (tmp_path / "new").exists()


def test_policies_that_cannot_be_read(rpt, tiny_task_dir, tmp_path):
    (tmp_path / "step-000001.ckpt").mkdir()
    for policy in ("step-000001.ckpt", "step-000002.ckpt"):
        status, output = rpt(
            "evaluate",
            "next-token",
            "--policy",
            tmp_path / policy,
            "--task_dir",
            tiny_task_dir,
            "--output",
            tmp_path / "new",
        )
        assert status == 1
        assert f"--policy {tmp_path / policy}: no such file" in output


def command(*args):
    environment = os.environ | {"PYTHONPATH": str(TRAINING)}
    done = subprocess.run(
        [sys.executable, "-m", "rpt_lightning.cli", *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tiny_model_dir, tiny_task_dir, tmp_path_factory):
    """Return two steps of one run, as a file and in shards, and their exports."""
    folder = tmp_path_factory.mktemp("trained")
    config = [
        "--config",
        CONFIGS / "debug.yaml",
        "--model.policy.path",
        tiny_model_dir,
        "--data.task_dir",
        tiny_task_dir,
        "--data.tasks_per_step",
        8,
    ]
    config += [
        "--rollout.objective.reward",
        "real_runs.SomeAreRight",
    ]  # a random model is never right, and without a reward no weight moves
    for name, strategy in (
        ("file", []),
        ("shards", ["--config", CONFIGS / "strategy" / "fsdp2.yaml", "--trainer.devices", 1]),
    ):
        flags = [
            "--trainer.max_steps",
            2,
            "--trainer.limit_val_batches",
            0,
            "--trainer.default_root_dir",
            folder / name,
        ]
        command("fit", *config, *strategy, *flags, "--trainer.accelerator", "cpu")
    file, shards = (folder / name / "checkpoints" / "step-000002.ckpt" for name in ("file", "shards"))
    assert file.is_file()
    assert shards.is_dir()
    command("export", "--ckpt", shards, "--output", folder / "exported")
    return [file, shards, folder / "exported"]


@pytest.mark.long
@pytest.mark.parametrize("engine", ["HFEngine", pytest.param("VLLMEngine", marks=pytest.mark.vllm)])
def test_a_folder_a_file_and_shards_in_one_command(engine, trained, tiny_model_dir, tiny_task_dir, tmp_path):
    if engine == "VLLMEngine" and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    policies = [tiny_model_dir, *trained]
    asked = ["--engine", engine, "--engine.dtype", "float32", "--prompt", "ContinuationPrompt", "--k", 2]
    output = command(
        "evaluate", "next-token", "--policy", *policies, "--task_dir", tiny_task_dir, *SMALL, *asked,
        "--output", tmp_path / "evaluation"
    )  # fmt: skip
    files = sorted((tmp_path / "evaluation").glob("**/validation/step-*.jsonl"))
    assert len(files) == 4
    measured = {
        path.parent.parent.name: read_results(path) for path in files if "checkpoints" not in path.parts
    }
    measured |= {path.parts[-5]: read_results(path) for path in files if "checkpoints" in path.parts}
    start = measured.pop("tiny")
    assert {name: results.step for name, results in measured.items()} == {
        "file": 2,
        "shards": 2,
        "exported": 0,
    }
    logprobs = [[position.ntp_logprob for position in results.positions] for results in measured.values()]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
    assert logprobs[0] == pytest.approx(logprobs[2], abs=1e-3)
    moved = [abs(one - p.ntp_logprob) for one, p in zip(logprobs[0], start.positions, strict=True)]
    assert max(moved) > 0.01
    for results in (start, *measured.values()):
        assert all(position.num_samples == 2 and position.length for position in results.positions)
    assert "/exported - reasoning " in output


def test_an_evaluation_is_not_overwritten(rpt, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.md").write_text("old")
    status, output = rpt(
        "evaluate",
        "next-token",
        "--policy",
        "models/p",
        "--task_dir",
        "tasks/t",
        "--output",
        tmp_path / "old",
    )
    assert status == 1
    assert "already holds an evaluation" in output
