from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rpt_lightning.records.question_results import (
    QuestionResult,
    QuestionResults,
    pair_questions,
    read_question_results,
    write_question_results,
)

QUESTION = QuestionResult(
    question_id="q-1", answer="4", category="sums", prompt_tokens=12, verdicts=("right", "truncated"),
    predictions=("4\u2028", None), lengths=(9, 64),
    direct_verdict="wrong", direct_prediction="5",
)  # fmt: skip
RESULTS = QuestionResults(
    questions=(QUESTION, replace(QUESTION, question_id="q-2")), benchmark="sums", policy_path="models/p",
    step=3, temperature=0.6, max_completion_tokens=64,
    seed=1, ckpt_path="runs/r/step-000003.ckpt",
)  # fmt: skip


def test_they_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_question_results(RESULTS, tmp_path / "answers" / "step-000003.jsonl")
    assert read_question_results(tmp_path / "answers" / "step-000003.jsonl") == RESULTS
    assert RESULTS.num_samples == 2


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "step-000003.jsonl"
    with pytest.raises(ValueError, match=r"step-000003.jsonl: no such file"):
        read_question_results(path)
    write_question_results(RESULTS, path)
    lines = path.read_text().split("\n")
    for text, message in [
        (lines[0] + "\n", r"1 questions, which is not what step-000003.json says"),
        (lines[0] + "\n" + lines[1][:20], r"line 2: not an answered question"),
        (
            lines[0] + "\n" + json.dumps(json.loads(lines[1]) | {"verdicts": ["right"]}),
            r"the questions have different numbers of completions",
        ),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_question_results(path)


def test_a_json_file_that_is_not_whole_or_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "step-000003.jsonl"
    write_question_results(RESULTS, path)
    about = json.loads(path.with_suffix(".json").read_text())
    without_seed = {name: value for name, value in about.items() if name != "seed"}
    for text, message in [
        (json.dumps(about)[:30], r"step-000003\.json: not JSON .*Run `rpt evaluate benchmark` again"),
        (
            json.dumps(without_seed),
            r"step-000003\.json: not an object with benchmark, policy_path, step, .*seed, num_questions",
        ),
        (json.dumps(about | {"top_p": 1.0}), r"step-000003\.json: top_p is not known here"),
    ]:
        path.with_suffix(".json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_question_results(path)
    path.with_suffix(".json").write_text(
        json.dumps({name: value for name, value in about.items() if name != "ckpt_path"})
    )
    assert read_question_results(path) == replace(RESULTS, ckpt_path=None)


def test_pairs_are_of_the_same_questions() -> None:
    turned = replace(RESULTS, questions=RESULTS.questions[::-1])
    assert pair_questions(RESULTS, turned) == [(question, question) for question in RESULTS.questions]
    with pytest.raises(ValueError, match=r"are to different questions, for example 'q-2'"):
        pair_questions(RESULTS, replace(RESULTS, questions=RESULTS.questions[:1]))
    with pytest.raises(
        ValueError, match=r"Question 'q-1' has the answer '4' in one result and '5' in the other"
    ):
        pair_questions(
            RESULTS, replace(RESULTS, questions=(replace(QUESTION, answer="5"), RESULTS.questions[1]))
        )
