"""Files that were edited or damaged raise one error that names the file, the line and the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rpt_lightning.records.question_results import (
    QuestionResult,
    QuestionResults,
    read_question_results,
    write_question_results,
)
from rpt_lightning.records.record_types import check_types
from rpt_lightning.records.results import PositionResult, Results, read_results, write_results
from rpt_lightning.records.rollout_samples import RolloutSample, read_samples, write_samples
from rpt_lightning.records.step_log import read_step_log


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2, "reward/mean": "high"}', "line 2: reward/mean is 'high', where a number belongs"),
        ('{"step": 2, "reward/mean": null}', "line 2: reward/mean is None, where a number belongs"),
        ('{"step": 2, "reward/mean": [1]}', r"line 2: reward/mean is \[1\], where a number belongs"),
        ('{"step": 2, "reward/mean": true}', "line 2: reward/mean is True, where a number belongs"),
        ('{"step": "2"}', "line 2: not an object with a step"),
        ('{"step": 2.5}', "line 2: not an object with a step"),
        ('{"step": -1}', "line 2: not an object with a step"),
        ("[2]", "line 2: not an object with a step"),
        ('"step"', "line 2: not an object with a step"),
        ('{"step"', "line 2: not JSON"),
        (b'{"step": "\xff"}', "not UTF-8"),
    ],
)
def test_step_logs(line: str | bytes, message: str, tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    log.write_bytes(
        b'{"step": 1, "reward/mean": 0.5, "optim/grad_norm": NaN}\n'
        + (line if isinstance(line, bytes) else line.encode())
        + b"\n"
    )
    with pytest.raises(ValueError, match=rf"steps\.jsonl.*{message}"):
        read_step_log(log)


def change(path: Path, name: str, value: Any) -> None:
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {name: value}) + "\n")


@pytest.mark.parametrize(
    ("suffix", "name", "value", "message"),
    [
        (".jsonl", "entropy", "high", r"line 1: entropy is 'high', where a number belongs"),
        (".jsonl", "ntp_correct", 1, r"line 1: ntp_correct is 1, where true or false belongs"),
        (".jsonl", "length", 1.5, r"line 1: length is 1\.5, where a whole number or null belongs"),
        (".jsonl", "token_kind", "noun", r"line 1: token_kind is 'noun', where"),
        (".json", "step", "3", r"step-3\.json: step is '3', where a whole number belongs"),
        (".json", "policy_path", None, r"step-3\.json: policy_path is None, where a text belongs"),
    ],
)
def test_results_of_positions(suffix: str, name: str, value: Any, message: str, tmp_path: Path) -> None:
    about = {
        "position": 4,
        "entropy": 1,
        "answerable": True,
        "truth": " 4",
        "ntp_correct": False,
        "ntp_logprob": -1.2,
    }
    path = tmp_path / "step-3.jsonl"
    write_results(
        Results(positions=(PositionResult(task_id="d:4", doc_id="d", **about),), policy_path="m", step=3),
        path,
    )  # type: ignore[arg-type]
    assert read_results(path).step == 3
    change(path.with_suffix(suffix), name, value)
    with pytest.raises(ValueError, match=message):
        read_results(path)


@pytest.mark.parametrize(
    ("suffix", "name", "value", "message"),
    [
        (
            ".jsonl",
            "lengths",
            ["9"],
            r"line 1: lengths is \('9',\), where a list with a whole number as each entry belongs",
        ),
        (".jsonl", "verdicts", ["rigth"], r"line 1: verdicts is \('rigth',\), where"),
        (".jsonl", "answer", 4, r"line 1: answer is 4, where a text belongs"),
        (".json", "temperature", "0.6", r"temperature is '0\.6', where a number belongs"),
    ],
)
def test_results_of_questions(suffix: str, name: str, value: Any, message: str, tmp_path: Path) -> None:
    question = QuestionResult(
        question_id="q",
        answer="4",
        category=None,
        prompt_tokens=2,
        verdicts=("right",),
        predictions=("4",),
        lengths=(9,),
        direct_verdict="quoted",
    )
    path = tmp_path / "step-3.jsonl"
    results = QuestionResults(
        questions=(question,),
        benchmark="b",
        policy_path="m",
        step=3,
        temperature=0,
        max_completion_tokens=9,
        seed=0,
    )
    write_question_results(results, path)
    assert read_question_results(path) == results
    change(path.with_suffix(suffix), name, value)
    with pytest.raises(ValueError, match=message):
        read_question_results(path)


def test_rollouts(tmp_path: Path) -> None:
    sample = RolloutSample(
        task_id="d:4",
        context="",
        truth=("4",),
        thought="",
        completion="",
        prediction=None,
        reward=1,
        finish_reason="stop",
        policy_version=3,
        tokens=("a",),
        logprobs=(-0.5,),
    )
    path = tmp_path / "step-1.jsonl"
    write_samples([sample], path)
    assert read_samples(path) == [sample]
    for name, value in {
        "reward": "1",
        "truth": "4",
        "finish_reason": "end",
        "logprobs": [None],
        "policy_version": 1.5,
    }.items():
        write_samples([sample], path)
        change(path, name, value)
        with pytest.raises(ValueError, match=f"line 1: {name} is "):
            read_samples(path)


def test_fields_that_a_record_does_not_have_are_not_looked_at() -> None:
    check_types({"step": 1, "unknown": object()}, Results, "here")
