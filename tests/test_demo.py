"""`make demo`: what its last lines say about given results, and that its commands belong to one seed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rpt_lightning.records.results import Results, write_results
from sample_results import FIRST

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
demo, testbed, stages, pipeline = (
    importlib.import_module(name) for name in ("demo", "testbed", "stages", "pipeline")
)
NUM_POSITIONS = 120


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def results(reasoning: Callable[[int], bool | None], ntp: Callable[[int], bool], step: int = 0) -> Results:
    positions = tuple(
        replace(
            FIRST,
            task_id=f"game-{number}:20",
            doc_id=f"game-{number}",
            fields={"depth": 2 + number % 11},
            reasoning_correct=reasoning(number),
            ntp_correct=ntp(number),
        )
        for number in range(NUM_POSITIONS)
    )
    return Results(positions=positions, policy_path="p", step=step)


def leave(after: Callable[[int], bool]) -> object:
    """The results of the stages: one in six is right at once, and RPT is right where ``after`` says so."""
    bed = testbed.Testbed.of(0)

    def sixth(number: int) -> bool:
        return number % 6 == 0

    write_results(results(sixth, sixth), stages.results_file(bed.before))
    write_results(results(after, sixth, bed.last_step), stages.results_file(bed.rpt, bed.last_step))
    write_results(results(lambda number: None, sixth, 140), stages.results_file(bed.ntp, 140))
    stages.checkpoint(bed.rpt, bed.last_step).parent.mkdir(parents=True)
    stages.checkpoint(bed.rpt, bed.last_step).touch()
    (bed.rpt / "steps.jsonl").write_text(
        '{"step": 1, "reward/mean": 0.2, "rollout/length_mean": 10.0}\n'
        '{"step": 2, "reward/mean": 0.9, "rollout/length_mean": 30.0}\n'
    )
    return bed


def test_a_demo_that_works_says_so_with_counts_and_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    bed = leave(lambda number: number % 20 != 1)  # 114 of 120
    assert demo.show(bed)
    output = capsys.readouterr().out
    assert (
        "After RPT the model is right at 95.0 % [89.5, 97.7] of 120 held-out positions by reasoning; "
        "before it was 16.7 % [11.1, 24.3]." in output
    )
    assert (
        "Next-token training at the same FLOPs reaches 16.7 % [11.1, 24.3] at the same positions: "
        "RPT is 78.3 points [" in output
    )
    assert "FAILED" not in output
    assert (bed.folder / "summary.png").stat().st_size > 10_000
    assert "78.3 points" in (bed.folder / "summary.md").read_text()


def test_a_demo_that_shows_too_little_fails_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """+52.5 points, but the interval begins below 50."""
    bed = leave(lambda number: number % 6 == 0 or number % 8 < 5)
    assert not demo.show(bed)
    assert (
        "demo: FAILED. The interval of RPT's lead should lie above 50 points but begins at 4"
        in capsys.readouterr().out
    )


def test_commands_of_a_seed_do_not_touch_another_seeds_folders() -> None:
    def commands(seed: int) -> list[str]:
        return [
            " ".join(stage.command())
            for stage in testbed.Testbed.of(seed).stages()
            if stage.name not in ("export start", "report")
        ]

    first, second = commands(0), commands(1)
    assert len(first) == len(second) == 7
    for one, other in zip(first, second, strict=True):
        assert "runs/demo-seed-1" in other or "models/cups-seed-1" in other
        assert "seed-1" not in one
    names = [stage.name for stage in testbed.Testbed.of(0).stages()]
    assert names == [
        "model",
        "start model",
        "export start",
        "prepare",
        "evaluate before",
        "RPT",
        "continual NTP",
        "evaluate continual NTP",
        "report",
    ]


def test_seed_0_is_what_the_configurations_name() -> None:
    """A user who types the commands of the headers gets the demo's own run."""
    bed = testbed.Testbed.of(0)
    start, rpt, ntp, prepare = (
        stages.settings(config)
        for config in (testbed.START_CONFIG, testbed.RPT_CONFIG, testbed.NTP_CONFIG, testbed.PREPARE_CONFIG)
    )
    assert [Path(run["trainer"]["default_root_dir"]) for run in (start, rpt, ntp)] == [
        bed.start,
        bed.rpt,
        bed.ntp,
    ]
    assert [Path(run["model"]["init_args"]["policy"]["init_args"]["path"]) for run in (start, rpt, ntp)] == [
        bed.model,
        bed.start_model,
        bed.start_model,
    ]
    assert [Path(run["data"]["init_args"]["task_dir"]) for run in (rpt, ntp)] == [bed.tasks] * 2
    assert Path(prepare["output_dir"]) == bed.tasks
    games = [
        config["init_args"]["seed"] for config in (start["data"]["init_args"]["source"], prepare["source"])
    ]
    assert games == [1, 2]
    # The last step is validated, which is what the verdict rests on.
    assert rpt["trainer"]["max_steps"] % rpt["trainer"]["val_check_interval"] == 0
    # The rival has the same rate and reads the same positions.
    rates = [run["model"]["init_args"]["optimizer"]["init_args"] for run in (rpt, ntp)]
    assert rates[0] == rates[1]
    held_out = [
        {name: run["data"]["init_args"][name] for name in ("num_eval_tasks", "eval_min_entropy")}
        for run in (rpt, ntp)
    ]
    assert held_out[0] == held_out[1]
