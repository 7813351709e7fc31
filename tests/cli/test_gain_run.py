"""Information gain through the commands, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

from rpt_lightning.records.results import read_results
from rpt_lightning.records.rollout_samples import read_samples

OVERLAY = Path(__file__).resolve().parents[2] / "configs" / "rollout" / "information-gain.yaml"
# A random model never writes the usual marker, but it writes this one now and then.
MARKERS = ["--rollout.objective.prompt.think_open", "(", "--rollout.objective.prompt.think_close", "e"]


def test_a_run_on_tasks_for_the_next_token(rpt, flags, tmp_path, tiny_model_dir, tiny_task_dir):
    run = tmp_path / "run"
    status, shown = rpt(
        "fit", *flags, "--config", OVERLAY, *MARKERS, "--rollout.objective.num_tokens", "2",
        "--trainer.default_root_dir", run, "--trainer.max_steps", "2",
    )  # fmt: skip
    assert status == 0, shown
    samples = [sample for path in sorted((run / "rollouts").glob("*.jsonl")) for sample in read_samples(path)]
    closed = [sample for sample in samples if sample.prediction is not None]
    assert closed
    assert len({sample.reward for sample in closed}) > len(closed) / 2  # real numbers
    assert all(sample.reward <= 0 for sample in samples if sample.prediction is None)
    results = read_results(run / "validation" / "step-000002.jsonl").positions
    assert any(row.boxed for row in results)
    assert all(
        row.reasoning_correct is not None and row.filler_thought_correct is not None for row in results
    )

    # What is right without a thought does not depend on the objective.
    status, shown = rpt("validate", *flags, "--trainer.default_root_dir", tmp_path / "ordinary")
    assert status == 0, shown
    status, shown = rpt(
        "validate", *flags, "--config", OVERLAY, *MARKERS, "--trainer.default_root_dir", tmp_path / "gain"
    )
    assert status == 0, shown
    ordinary, gain = (
        read_results(tmp_path / name / "validation" / "step-000000.jsonl").positions
        for name in ("ordinary", "gain")
    )
    assert [(row.task_id, row.ntp_correct, row.truth) for row in gain] == [
        (row.task_id, row.ntp_correct, row.truth) for row in ordinary
    ]


def test_rollouts_ahead_are_refused(rpt, flags, tmp_path):
    status, shown = rpt(
        "fit", *flags, "--config", OVERLAY, "--rollout.max_staleness", "1", "--model.correction", "truncate",
        "--trainer.default_root_dir", tmp_path,
    )  # fmt: skip
    assert status == 1
    assert "InformationGainObjective asks the policy for log-probs" in shown
