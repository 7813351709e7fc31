"""Masked spans through every command, on a tiny model that knows nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.masked_span import MaskedSpanObjective
from rpt_lightning.records.results import read_results
from rpt_lightning.records.rollout_samples import read_samples

ROOT = Path(__file__).resolve().parents[2]
# Spans of up to two words, chosen at random. A seed of their own must be kept by every command.
SPANS = {"max_length": "2", "max_tokens": "10", "seed": "3"}


def options(flag: str, **more: str) -> list[str]:
    named = [word for name, value in (SPANS | more).items() for word in (f"{flag}.{name}", value)]
    return [flag, "MaskedSpanObjective", *named]


@pytest.fixture
def prepare(rpt, tiny_model_dir):
    def run(folder: Path, *more: str) -> tuple[int, str]:
        return rpt(
            "prepare", "--config", ROOT / "configs/prepare/debug.yaml", "--source.package", "unittest",
            "--output_dir", folder, "--tokenizer", tiny_model_dir, "--proxy", tiny_model_dir,
            "--heldout_documents", "4", "--max_documents", "40", "--max_tokens_per_document", "96", *more,
        )  # fmt: skip

    return run


def test_every_command_takes_it(rpt, prepare, tiny_model_dir, tmp_path):
    folder, run = tmp_path / "spans", tmp_path / "run"
    chosen = ["--random_share", "0.5", "--answer_reach", "10"]
    status, shown = prepare(folder, *options("--objective"), *chosen)
    assert status == 0, shown
    objective = MaskedSpanObjective(max_length=2, max_tokens=10, seed=3)
    prepared = TaskFolder(folder, "train")
    assert prepared.places == objective.places == "masked spans of 1 to 2 words (max_tokens 10, seed 3)"

    flags = [
        "--config", ROOT / "configs/debug.yaml", "--model.policy.path", tiny_model_dir,
        "--data.task_dir", folder, "--data.tasks_per_step", "4", "--data.positions_per_document", "2",
        "--data.num_eval_tasks", "8", "--data.max_context_tokens", "64", "--data.eval_min_entropy", "-1",
    ]  # fmt: skip
    ask = options("--rollout.objective", num_behind="6")
    status, shown = rpt("fit", *flags, *ask, "--trainer.default_root_dir", run, "--trainer.max_steps", "2")
    assert status == 0, shown
    # Every sample's truth is words that its document holds between spaces, and its reward is exact match.
    (samples,) = (read_samples(path) for path in sorted((run / "rollouts").glob("*-000001.jsonl")))
    assert samples
    for sample in samples:
        truth = "".join(sample.truth)
        assert truth == truth.strip()
        assert len(truth.split(" ")) <= 2
        assert sample.reward == float(sample.prediction == truth)

    status, shown = rpt("validate", *flags, *ask, "--trainer.default_root_dir", tmp_path / "start")
    assert status == 0, shown
    start = read_results(tmp_path / "start" / "validation" / "step-000000.jsonl")
    end = read_results(run / "validation" / "step-000002.jsonl")
    assert [row.truth for row in start.positions] == [row.truth for row in end.positions]
    # Without a thought, every position has a log-prob of the hidden text and an accuracy.
    assert all(row.ntp_logprob < 0 and row.reasoning_correct is not None for row in end.positions)

    status, shown = rpt(
        "evaluate", "next-token", "--policy", tiny_model_dir, "--task_dir", folder, "--num_tasks", "8",
        "--max_context_tokens", "64", "--min_entropy", "-1", "--engine", "HFEngine",
        "--engine.dtype", "float32", *options("--objective", num_behind="6"), "--k", "0",
        "--max_completion_tokens", "8", "--output", tmp_path / "evaluation", "--against", run,
    )  # fmt: skip
    assert status == 0, shown
    assert "without" in (tmp_path / "evaluation" / "summary.md").read_text()
    assert rpt("compare", run, tmp_path / "start")[0] == 0
    assert rpt("report", run, "--output", tmp_path / "report.html")[0] == 0

    # A folder for other spans is refused.
    for ask in (options("--rollout.objective", seed="4"), ["--rollout.objective", "MaskedSpanObjective"]):
        status, shown = rpt("fit", *flags, *ask, "--trainer.default_root_dir", tmp_path / "other")
        assert status == 1
        assert "prepared for masked spans of 1 to 2 words (max_tokens 10, seed 3), but" in shown
    status, shown = rpt("fit", *flags, "--trainer.default_root_dir", tmp_path / "other")
    assert status == 1
    assert "but NextTokenObjective asks about next token" in shown
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_a_folder_for_the_next_token_is_refused(rpt, flags, tmp_path):
    status, shown = rpt(
        "fit", *flags, "--rollout.objective", "MaskedSpanObjective", "--trainer.default_root_dir", tmp_path
    )
    assert status == 1
    assert "prepared for next token, but MaskedSpanObjective asks about masked spans" in shown
    assert "rpt prepare --objective MaskedSpanObjective" in shown


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            options("--objective"),
            "--answer_reach 8: right answers of --objective MaskedSpanObjective are found",
        ),
        (
            [*options("--objective"), "--answer_reach", "90"],
            "--max_tokens_per_document 96: shorter than a context of --min_context 16 tokens and an answer",
        ),
        (options("--objective", max_length="10"), "max_tokens 10: a span of 10 words has"),
        (options("--objective", mark=" "), "mark ' ': it must be visible"),
        (["--random_share", "0"], "--random_share 0.0: give a share above 0 and up to 1"),
        (["--random_share", "1.5"], "--random_share 1.5: give a share above 0 and up to 1"),
        (["--random_share", "1e-9"], "--random_share 1e-09: no position of the heldout documents passes"),
    ],
)
def test_bad_input_leaves_no_folder(prepare, tmp_path, more, says):
    status, shown = prepare(tmp_path / "spans", *more)
    assert status == 1
    assert says in shown
    assert not (tmp_path / "spans").exists()


def test_prompts_that_do_not_fit_are_refused_before_the_first_step(rpt, prepare, tiny_model_dir, tmp_path):
    folder = tmp_path / "spans"
    assert prepare(folder, "--objective", "MaskedSpanObjective")[0] == 0
    status, shown = rpt(
        "fit", "--config", ROOT / "configs/debug.yaml", "--model.policy.path", tiny_model_dir,
        "--data.task_dir", folder, "--data.tasks_per_step", "4", "--data.num_eval_tasks", "4",
        "--rollout.objective", "MaskedSpanObjective", "--rollout.objective.num_behind", "100",
        "--trainer.default_root_dir", tmp_path / "run",
    )  # fmt: skip
    assert status == 1
    assert "--rollout.max_prompt_tokens 160: the longest context" in shown
    assert "the prompt template adds 1" in shown
