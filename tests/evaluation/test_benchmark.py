"""`rpt evaluate benchmark` from the command line.

A small policy that answers 4 or 5 is asked with transformers' engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rpt_lightning import cli
from rpt_lightning.evaluation.benchmark import by_start
from rpt_lightning.evaluation.tables.answers import AnswerStage, before_after_table
from rpt_lightning.records.question_results import QuestionResult, QuestionResults, read_question_results

ENGINE = [
    "--engine",
    "HFEngine",
    "--engine.dtype",
    "float32",
    "--prompt",
    "QuestionPrompt",
    "--accelerator",
    "cpu",
]


@pytest.fixture
def rpt(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))

    def run(*args):
        capfd.readouterr()
        try:
            status = cli.main([str(arg) for arg in args])
        except SystemExit as end:  # how parsers end
            status = end.code or 0
        shown = capfd.readouterr()
        return status, shown.out + shown.err

    return run


@pytest.fixture
def math500(tmp_path: Path) -> Path:
    rows = [
        {
            "problem": f"What is {number + 4} - {number}?",
            "solution": "Count.",
            "answer": "\\frac{8}{2}" if number < 4 else "\\pi",
            "subject": "Prealgebra" if number < 4 else "Geometry",
            "level": 1,
            "unique_id": f"test/{number}.json",
        }
        for number in range(6)
    ]
    path = tmp_path / "math500.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_policy_and_then_others_against_it(rpt, answering_model_dir, tiny_model_dir, math500, tmp_path):
    common = [
        "evaluate",
        "benchmark",
        "--benchmark",
        "math500",
        "--file",
        math500,
        "--max_completion_tokens",
        "32",
        *ENGINE,
    ]
    status, output = rpt(
        *common,
        "--policy",
        answering_model_dir,
        "--k",
        "4",
        "--temperature",
        "1.0",
        "--output",
        tmp_path / "one",
    )
    assert status == 0, output
    path = tmp_path / "one" / "answering" / "answers" / "step-000000.jsonl"
    results = read_question_results(path)
    assert (results.benchmark, results.temperature, results.max_completion_tokens) == ("math500", 1.0, 32)
    assert [question.question_id for question in results.questions] == [
        f"test/{number}.json" for number in range(6)
    ]
    for question in results.questions:
        for verdict, prediction in zip(question.verdicts, question.predictions, strict=True):
            assert (verdict == "right") == (prediction == "4" and question.category == "Prealgebra")
            assert (prediction is None) == (verdict in ("truncated", "unboxed"))
        assert question.direct_verdict is not None
    assert {"right", "wrong"} <= {verdict for question in results.questions for verdict in question.verdicts}
    for row in (
        "accuracy after a thought (avg@4)",
        "pass@4",
        "accuracy without a thought",
        "truncated completions",
        "Geometry: after a thought",
    ):
        assert f"| {row} |" in output
    assert (tmp_path / "one" / "summary.md").read_text() in output

    # Ask a part of the questions greedily. A comparison with answers to other questions is refused.
    flags = ["--k", "0", "--num_questions", "3", "--direct", "false"]
    status, output = rpt(
        *common, *flags, "--policy", tiny_model_dir, answering_model_dir, "--output", tmp_path / "two"
    )
    assert status == 0, output
    assert "- after a thought: answering - tiny: " in output
    greedy = read_question_results(tmp_path / "two" / "answering" / "answers" / "step-000000.jsonl")
    assert (greedy.temperature, greedy.num_samples, len(greedy.questions)) == (0.0, 1, 3)
    random = read_question_results(tmp_path / "two" / "tiny" / "answers" / "step-000000.jsonl")
    assert {verdict for question in random.questions for verdict in question.verdicts} <= {
        "truncated",
        "unboxed",
    }
    status, output = rpt("compare", tmp_path / "two" / "tiny", tmp_path / "two" / "answering")
    assert status == 0, output
    assert "| math500 | tiny | answering |" in output
    status, output = rpt("compare", tmp_path / "one" / "answering", tmp_path / "two" / "answering")
    assert status == 1
    assert "are to different questions" in output

    # With --against, answers to other questions are refused at once.
    greedy_answers = tmp_path / "two" / "answering"
    status, output = rpt(
        *common,
        *flags,
        "--policy",
        tiny_model_dir,
        "--against",
        greedy_answers,
        "--output",
        tmp_path / "three",
    )
    assert status == 0, output
    assert f"- after a thought: tiny - {greedy_answers}: " in output
    status, output = rpt(
        *common, "--policy", tiny_model_dir, "--against", greedy_answers, "--output", tmp_path / "four"
    )
    assert status == 1
    assert "answers to other questions (3 of math500) than the 6 asked here, for example 'test/" in output
    assert not (tmp_path / "four").exists()


def asked(name, *, start, step, ckpt_path=None):
    question = QuestionResult(
        question_id="q",
        answer="4",
        category=None,
        prompt_tokens=1,
        verdicts=("right",),
        predictions=("4",),
        lengths=(1,),
    )
    results = QuestionResults(
        questions=(question,),
        benchmark="b",
        policy_path=start,
        step=step,
        temperature=0.0,
        max_completion_tokens=8,
        seed=0,
        ckpt_path=ckpt_path,
    )
    return AnswerStage(name=name, results=results)


def test_checkpoints_stand_behind_their_start_run_by_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "p").mkdir(parents=True)
    stages = [
        asked("a-40", start="models/p", step=40, ckpt_path="runs/a/checkpoints/step-000040.ckpt"),
        asked("b-40", start="./models/p", step=40, ckpt_path="runs/b/checkpoints/step-000040.ckpt"),
        asked(
            "a-20", start="models/p", step=20, ckpt_path=str(tmp_path / "runs/a/checkpoints/step-000020.ckpt")
        ),
        asked("p", start=str(tmp_path / "models" / "p"), step=0),
        asked("c-20", start="org/q", step=20, ckpt_path="runs/c/checkpoints/step-000020.ckpt"),
        asked("c-40", start="org/q", step=40, ckpt_path="runs/c/checkpoints/step-000040.ckpt"),
    ]
    assert [[stage.name for stage in run] for run in by_start(stages)] == [
        ["p", "a-20", "a-40"],
        ["p", "b-40"],
    ]
    table = before_after_table(by_start(stages))
    assert "| a-40 | 100.0 %" in table
    assert "| b-40 | 100.0 %" in table
    assert "c-40" not in table  # its start was not asked
    assert "- before: " not in table  # the same answers
    assert "- after: b-40 - a-40: +0.0 points" in table
    assert before_after_table(by_start(stages[:2])) is None


def test_choices_are_answered_by_letter(rpt, tiny_model_dir, tmp_path):
    row = {
        "question_id": 1,
        "question": "Which?",
        "options": ["1", "2"],
        "answer": "B",
        "answer_index": 1,
        "category": "math",
        "src": "",
    }
    path = tmp_path / "mmlu_pro.jsonl"
    path.write_text(json.dumps(row) + "\n")
    flags = [
        "--benchmark",
        "mmlu_pro",
        "--file",
        path,
        "--max_completion_tokens",
        "8",
        "--output",
        tmp_path / "out",
        *ENGINE,
    ]
    status, output = rpt("evaluate", "benchmark", "--policy", tiny_model_dir, *flags)
    assert status == 0, output
    assert "| math: after a thought | 0.0 % [0.0, 79.3] 1 questions |" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --benchmark"),
        (["--benchmark", "aime26"], "--benchmark 'aime26': the benchmarks are aime24"),
        (
            ["--benchmark", "aime24", "--file", "nowhere.jsonl"],
            "nowhere.jsonl: there is no such file of questions",
        ),
        (["--benchmark", "aime24", "--k", "-1"], "--k -1: give 1 or more"),
        (
            [
                "--benchmark",
                "aime24",
                "--file",
                "nowhere.jsonl",
                "--prompt",
                "rpt_lightning.objectives.prompts.template.ChatPrompt",
            ],
            "cannot use ChatPrompt, which asks for the next token; give the prompt QuestionPrompt",
        ),
    ],
)
def test_bad_flags_are_one_clear_error(rpt, tiny_model_dir, tmp_path, flags, message):
    status, output = rpt(
        "evaluate", "benchmark", "--policy", tiny_model_dir, "--output", tmp_path / "new", *ENGINE, *flags
    )
    assert status == 1
    assert message in output
    assert not (tmp_path / "new").exists()
