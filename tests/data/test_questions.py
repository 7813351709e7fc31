"""From rows to questions: the fields of each benchmark, and errors that name the row.

The rows have the shape of each benchmark, with made-up content.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rpt_lightning.data.sources.benchmarks import BENCHMARKS, benchmark_source
from rpt_lightning.data.sources.questions import (
    HuggingFaceQuestions,
    JsonlQuestions,
    QuestionFields,
    read_all,
)
from rpt_lightning.types import Question

# One row of each dataset in the form that its card describes. The contents are ours.
ROWS: dict[str, dict[str, Any]] = {
    "aime24": {
        "id": 60,
        "problem": "Find $x$.",
        "solution": "It is 33.",
        "answer": "033",
        "url": "https://example.org/1",
        "year": "2024",
    },
    "aime25": {"problem": "Find $y$.", "answer": "70", "id": "0"},
    "math500": {
        "problem": "Simplify $\\frac{2}{4}$.",
        "solution": "It is $\\boxed{\\frac{1}{2}}$.",
        "answer": "\\frac{1}{2}",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": "test/prealgebra/1.json",
    },
    "mmlu_pro": {
        "question_id": 70,
        "question": "Which is even?",
        "options": ["1", "2", "3"],
        "answer": "B",
        "answer_index": 1,
        "cot_content": "",
        "category": "math",
        "src": "made up",
    },
    "supergpqa": {
        "uuid": "0a1b",
        "question": "Which is odd?",
        "options": ["2", "4", "5", "6"],
        "answer": "5",
        "answer_letter": "C",
        "discipline": "Science",
        "field": "Mathematics",
        "subfield": "Number Theory",
        "difficulty": "easy",
        "is_calculation": False,
    },
}
QUESTIONS = {
    "aime24": Question(question_id="60", text="Find $x$.", answer="033"),
    "aime25": Question(question_id="0", text="Find $y$.", answer="70"),
    "math500": Question(
        question_id="test/prealgebra/1.json",
        text="Simplify $\\frac{2}{4}$.",
        answer="\\frac{1}{2}",
        category="Prealgebra",
    ),
    "mmlu_pro": Question(
        question_id="70", text="Which is even?", answer="B", choices=("1", "2", "3"), category="math"
    ),
    "supergpqa": Question(
        question_id="0a1b", text="Which is odd?", answer="C", choices=("2", "4", "5", "6"), category="Science"
    ),
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_a_benchmark(name: str, tmp_path: Path) -> None:
    assert read_all(
        benchmark_source(name, file=write(tmp_path / "rows.jsonl", ROWS[name])), flag="benchmark"
    ) == (QUESTIONS[name],)


def test_a_benchmark_comes_from_the_hub_where_no_file_is_given() -> None:
    source = benchmark_source("supergpqa", revision="abc")
    assert isinstance(source, HuggingFaceQuestions)
    assert (source.name, source.split, source.revision) == ("m-a-p/SuperGPQA", "train", "abc")
    with pytest.raises(ValueError, match=r"--benchmark 'aime26': the benchmarks are aime24, aime25"):
        benchmark_source("aime26")


def test_a_folder_that_datasets_reads(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "test.jsonl", ROWS["mmlu_pro"])
    fields = BENCHMARKS["mmlu_pro"].fields
    assert list(HuggingFaceQuestions(str(tmp_path), "test", fields).questions()) == [QUESTIONS["mmlu_pro"]]


def test_nested_fields_and_answers_in_a_list(tmp_path: Path) -> None:
    """This is the shape of Skywork-OR1."""
    rows = [
        {"prompt": [{"role": "user", "content": f"Q{number}"}], "reward_model": {"ground_truth": truth}}
        for number, truth in enumerate(['["[1, 2)"]', "[1, 2]"])
    ]
    source = JsonlQuestions(
        str(write(tmp_path / "rl.jsonl", *rows)),
        QuestionFields(question="prompt.0.content", answer="reward_model.ground_truth"),
    )
    assert [(question.question_id, question.text, question.answer) for question in source.questions()] == [
        ("rl:1", "Q0", "[1, 2)"),
        ("rl:2", "Q1", "[1, 2]"),
    ]


@pytest.mark.parametrize(
    ("fields", "row", "message"),
    [
        (
            QuestionFields(),
            {"question": "?", "answer": "1"},
            r"line 1: no field 'problem' \(fields: question, answer\)",
        ),
        (QuestionFields(), {"problem": "?", "answer": None}, r"line 1: no field 'answer'"),
        (QuestionFields(), {"problem": "?", "answer": " "}, r"line 1, field answer: ' ' is not an answer"),
        (QuestionFields(), {"problem": "?", "answer": ["1", "2"]}, r"line 1, field answer: 2 answers"),
        (QuestionFields(), ["?"], r"line 1: no field 'problem'"),
        (
            QuestionFields(),
            {"problem": ["?"], "answer": "1"},
            r"line 1, field problem: \['\?'\] is not the text of a question",
        ),
        (
            QuestionFields(),
            {"problem": 7, "answer": "1"},
            r"line 1, field problem: 7 is not the text of a question",
        ),
        (
            QuestionFields(),
            {"problem": {"text": "?"}, "answer": "1"},
            r"line 1, field problem: \{'text': '\?'\} is not the text of a question",
        ),
        (
            QuestionFields(),
            {"problem": " ", "answer": "1"},
            r"line 1, field problem: ' ' is not the text of a question",
        ),
        (QuestionFields(), {"problem": "?", "answer": float("nan")}, r"line 1, field answer: the number nan"),
        (
            QuestionFields(),
            {"problem": "?", "answer": float("-inf")},
            r"line 1, field answer: the number -inf",
        ),
        (
            QuestionFields(),
            {"problem": "?", "answer": " NaN "},
            r"line 1, field answer: 'NaN' is what programs write for a missing value",
        ),
        (
            QuestionFields(),
            {"problem": "?", "answer": "-inf"},
            r"line 1, field answer: '-inf' is what programs write",
        ),
        (QuestionFields(), {"problem": "?", "answer": True}, r"line 1, field answer: True is not an answer"),
        (
            QuestionFields(),
            {"problem": "?", "answer": {"value": 1}},
            r"line 1, field answer: \{'value': 1\} is not an answer",
        ),
        (
            QuestionFields(category="tags"),
            {"problem": "?", "answer": 1, "tags": ["a"]},
            r"line 1, field tags: \['a'\] \(list\) is not text",
        ),
        (
            QuestionFields(id="key"),
            {"problem": "?", "answer": 1, "key": {"n": 1}},
            r"line 1, field key: .*\(dict\) is not text",
        ),
        (
            QuestionFields(choices="options"),
            {"problem": "?", "answer": "C", "options": ["1", "2"]},
            r"the answer 'C' is not a letter of the 2 choices \(A to B\)",
        ),
        (
            QuestionFields(choices="options"),
            {"problem": "?", "answer": "A", "options": "1, 2"},
            r"field options: '1, 2' is not a list of 2 to 26 choices",
        ),
    ],
)
def test_broken_rows(fields: QuestionFields, row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(JsonlQuestions(str(write(tmp_path / "q.jsonl", row)), fields).questions())


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (0.00001, "0.00001"),
        ("1e-05", "0.00001"),
        (1e22, "1" + 22 * "0"),
        (2.5, "2.5"),
        (["7"], "7"),
        ("e-5", "e-5"),
        (r"\infty", r"\infty"),
        (0, "0"),
    ],
)
def test_answers_in_digits(answer: Any, text: str, tmp_path: Path) -> None:
    """Math-Verify reads 1e-05 as e - 5."""
    (question,) = JsonlQuestions(
        str(write(tmp_path / "q.jsonl", {"problem": "?", "answer": answer}))
    ).questions()
    assert question.answer == text


def test_broken_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.jsonl: there is no such file of questions"):
        read_all(JsonlQuestions(str(tmp_path / "nowhere.jsonl")), flag="data.train")
    with pytest.raises(ValueError, match=r"--data.train: the source holds no questions"):
        read_all(JsonlQuestions(str(write(tmp_path / "empty.jsonl"))), flag="data.train")
    twice = write(tmp_path / "twice.jsonl", *[{"id": 1, "problem": "?", "answer": 1}] * 2)
    with pytest.raises(ValueError, match=r"--data.train: two questions have the id '1'"):
        read_all(JsonlQuestions(str(twice), QuestionFields(id="id")), flag="data.train")
