"""An objective from outside, in one file, through every command (examples/masked_word.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.records.results import read_results
from rpt_lightning.records.rollout_samples import read_samples

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "masked_word.py"


@pytest.fixture(scope="module")
def masked_word():
    sys.path.insert(0, str(EXAMPLE.parent))
    import masked_word

    yield masked_word
    sys.path.remove(str(EXAMPLE.parent))


def test_it_is_short():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize(
    ("tokens", "length"),
    [
        ([b" the", b" sum"], 1),
        ([b" su", b"m", b"mand", b","], 3),
        ([b" sum", b"mand"], 0),  # nothing shows where it ends
        ([b"the", b" sum"], 0),
        ([b" 12", b" "], 0),
        ([b" a1", b" "], 0),
        ([b" ", b"word", b"."], 2),
        ([b"  ", b"word", b"."], 0),
        ([], 0),
    ],
)
def test_what_a_word_is(masked_word, tokens, length):
    assert masked_word.word_length(tokens) == length


def test_every_command_takes_it(rpt, masked_word, tiny_model_dir, tmp_path):
    folder, run = tmp_path / "words", tmp_path / "run"
    status, shown = rpt(
        "prepare", "--config", ROOT / "configs/prepare/debug.yaml", "--objective", "masked_word.MaskedWord",
        "--source.package", "unittest", "--output_dir", folder,
        "--tokenizer", tiny_model_dir, "--proxy", tiny_model_dir,
        "--heldout_documents", "4", "--max_documents", "40", "--max_tokens_per_document", "96",
    )  # fmt: skip
    assert status == 0, shown
    prepared = TaskFolder(folder, "train")
    assert prepared.places == "masked_word.MaskedWord"
    objective = masked_word.MaskedWord(num_behind=6)
    prepared.num_following_tokens = objective.num_following_tokens
    tasks = [
        prepared.task(document, k) for document in range(5) for k in range(prepared.num_positions[document])
    ]
    bound = BoundObjective(objective, prepared.tokenizer)
    for task in tasks:
        word = b"".join(bound.truth(task))
        assert word.startswith(b" ")
        assert word[1:].isalpha()
        # The word itself is right, with or without its space, and is not in what the policy sees there.
        assert bound.is_right(word, task)
        assert bound.is_right(word.strip(), task)
        assert not bound.is_right(word[:-1], task)
        before, behind = bound.tokens.join(objective.context_ids(task, bound.tokens)).split(b" ____")[-2:]
        assert before.endswith(bound.tokens.join(task.context_ids)[-8:].split(b" ____")[-1])
        assert bound.tokens.join(task.following_ids).startswith(word + behind)
        assert bound.direct_sequence(task).prompt_ids[-len(bound.prompt.answer_open_ids) :] == (
            bound.prompt.answer_open_ids
        )
        assert bound.tokens.join(bound.direct_sequence(task).target_ids) == word

    flags = [
        "--config", ROOT / "configs/debug.yaml", "--model.policy.path", tiny_model_dir,
        "--data.task_dir", folder, "--data.tasks_per_step", "4", "--data.positions_per_document", "2",
        "--data.num_eval_tasks", "8", "--data.max_context_tokens", "64",
    ]  # fmt: skip
    ask = ["--rollout.objective", "masked_word.MaskedWord", "--rollout.objective.num_behind", "6"]
    status, shown = rpt("fit", *flags, *ask, "--trainer.default_root_dir", run, "--trainer.max_steps", "2")
    assert status == 0, shown
    (samples,) = (read_samples(path) for path in sorted((run / "rollouts").glob("*-000001.jsonl")))
    assert all("".join(sample.truth)[1:].isalpha() for sample in samples)
    assert all(
        sample.reward == float((sample.prediction or "").strip() == "".join(sample.truth).strip())
        for sample in samples
    )

    status, shown = rpt("validate", *flags, *ask, "--trainer.default_root_dir", tmp_path / "start")
    assert status == 0, shown
    start = read_results(tmp_path / "start" / "validation" / "step-000000.jsonl")
    end = read_results(run / "validation" / "step-000002.jsonl")
    assert [row.truth for row in start.positions] == [row.truth for row in end.positions]
    assert all(row.truth[1:].isalpha() and row.reasoning_correct is not None for row in end.positions)

    status, shown = rpt(
        "evaluate", "next-token", "--policy", tiny_model_dir, "--task_dir", folder, "--num_tasks", "8",
        "--max_context_tokens", "64", "--engine", "HFEngine", "--engine.dtype", "float32",
        "--objective", "masked_word.MaskedWord", "--objective.num_behind", "6", "--k", "0",
        "--max_completion_tokens", "8", "--output", tmp_path / "evaluation",
        "--against", run,
    )  # fmt: skip
    assert status == 0, shown
    assert "without" in (tmp_path / "evaluation" / "summary.md").read_text()
    assert rpt("compare", run, tmp_path / "start")[0] == 0
    assert rpt("report", run, "--output", tmp_path / "report.html")[0] == 0
    assert "class_path: masked_word.MaskedWord" in (run / "config.yaml").read_text()

    # A folder for words is none for the next token, and the other way round.
    status, shown = rpt("fit", *flags, "--trainer.default_root_dir", tmp_path / "other")
    assert status == 1
    assert "prepared for masked_word.MaskedWord, but NextTokenObjective asks about next token" in shown


def test_a_folder_for_the_next_token_is_refused(rpt, masked_word, flags, tmp_path):
    status, shown = rpt(
        "fit", *flags, "--rollout.objective", "masked_word.MaskedWord", "--trainer.default_root_dir", tmp_path
    )
    assert status == 1
    assert "prepared for next token, but MaskedWord asks about masked_word.MaskedWord" in shown
    assert "rpt prepare --objective MaskedWord" in shown
