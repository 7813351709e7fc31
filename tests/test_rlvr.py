"""Reinforcement fine-tuning on questions, from the command line with configs/rlvr.yaml.

A small policy that answers 4 or 5 learns that the answer is 4.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from rpt_lightning import cli
from rpt_lightning.records.question_results import read_question_results

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "rlvr.yaml"


def write_questions(path: Path, number: int, offset: int = 0) -> Path:
    rows = [
        {"problem": f"What is {offset + index + 4} - {offset + index}?", "answer": "\\frac{8}{2}"}
        for index in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(answering_model_dir, tmp_path):
    """The config itself, with a model, questions and an engine of this machine's size."""
    values = yaml.safe_load(CONFIG.read_text())
    values["trainer"] |= {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "max_steps": 4,
        "val_check_interval": 4,
    }
    values["trainer"]["default_root_dir"] = str(tmp_path / "run")
    values["model"]["init_args"]["policy"]["init_args"] = {"path": str(answering_model_dir)}
    values["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 1e-3
    for part, number, offset in (("train", 5, 0), ("heldout", 4, 5)):
        path = write_questions(tmp_path / f"{part}.jsonl", number, offset)
        values["data"]["init_args"][part] = {"class_path": "JsonlQuestions", "init_args": {"path": str(path)}}
    values["data"]["init_args"] |= {"tasks_per_step": 4}
    values["rollout"] |= {
        "max_prompt_tokens": 128,
        "sampling": {"temperature": 1.0, "max_completion_tokens": 32},
        "evaluation": {"samples": 4, "thought_controls": True},
    }
    values["rollout"]["engine"] = {"class_path": "HFEngine", "init_args": {"dtype": "float32"}}
    values["rollout"]["objective"]["init_args"]["reward"]["init_args"] = {"num_workers": 1}
    values["samples"] = {"every_n_steps": 1}
    path = tmp_path / "rlvr.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def rpt(capfd, caplog, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))

    def run(*args):
        capfd.readouterr()
        caplog.clear()
        status = cli.main([str(arg) for arg in args])
        shown = capfd.readouterr()
        return status, shown.out + shown.err + caplog.text

    return run


def test_a_run_learns_from_checked_answers_and_is_compared_with_its_start(config, rpt, tmp_path):
    run = tmp_path / "run"
    for verb in ("validate", "fit"):
        status, output = rpt(verb, "--config", config)
        assert status == 0, output
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert {"answers/timeouts", "answers/check_errors", "answers/unreadable"} <= steps[0].keys()
    rollouts = [
        json.loads(line)
        for path in sorted((run / "rollouts").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    for rollout in rollouts:
        assert rollout["truth"] == ["\\frac{8}{2}"]
        assert rollout["reward"] == float(rollout["prediction"] == "4")
    assert {0.0, 1.0} == {rollout["reward"] for rollout in rollouts}
    assert steps[-1]["reward/mean"] > steps[0]["reward/mean"]

    before, after = (read_question_results(run / "answers" / f"step-{step:06d}.jsonl") for step in (0, 4))
    assert [question.question_id for question in after.questions] == [
        f"heldout:{number}" for number in (1, 2, 3, 4)
    ]
    assert (after.benchmark, after.step, after.temperature, after.num_samples) == ("Skywork-OR1", 4, 1.0, 4)
    assert sum(question.num_right for question in after.questions) > sum(
        question.num_right for question in before.questions
    )
    assert all(question.direct_prediction in ("4", "5") for question in before.questions)

    status, output = rpt("compare", run)
    assert status == 0, output
    assert "| Skywork-OR1 | before | after | after - before |" in output
    assert "at step 4 | +" in output


def test_questions_and_an_objective_for_positions_do_not_fit(config, rpt):
    values = yaml.safe_load(config.read_text())
    values["rollout"]["objective"] = {
        "class_path": "NextTokenObjective",
        "init_args": {
            "prompt": {"class_path": "ContinuationPrompt"},
            "reward": {"class_path": "PrefixMatchReward"},
        },
    }
    config.write_text(yaml.safe_dump(values))
    status, output = rpt("validate", "--config", config)
    assert status == 1
    assert (
        "AnswerTaskDataModule serves questions, and NextTokenObjective asks about next token; "
        "give --rollout.objective QuestionObjective" in output
    )
