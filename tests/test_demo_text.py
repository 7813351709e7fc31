from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rpt_lightning.records.results import read_results, write_results
from sample_results import FIRST, SECOND, results

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
demo, pipeline, stages = (importlib.import_module(name) for name in ("demo_text", "pipeline", "stages"))
FOLDER = Path("marks")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stage(name: str, code: str, **options):
    command = (sys.executable, "-c", f"open('log', 'a').write('{name} '); {code}")
    return pipeline.Stage(
        name=name, command=lambda: command, output=Path(name), minutes=1, folder=FOLDER, **options
    )


def run(*sequence) -> None:
    pipeline.run_stages(sequence, program="demo-text", again="make demo-text")


def demo_fit(**options):
    return stages.fit("fit", Path("run"), "configs/demo-text.yaml", folder=FOLDER, minutes=1, **options)


def touch(name: str) -> str:
    return f"open('{name}', 'w')"


def test_a_failed_demo_continues_with_the_stage_that_failed(capfd: pytest.CaptureFixture[str]):
    one, three = stage("one", touch("one")), stage("three", touch("three"))
    with pytest.raises(
        SystemExit, match=r"stage 2 of 3: two failed \(exit status 3.*`make demo-text` tries it again"
    ):
        run(one, stage("two", "raise SystemExit(3)"), three)
    assert Path("log").read_text() == "one two "

    two = stage("two", touch("two"))
    run(one, two, three)
    assert Path("log").read_text() == "one two two three "
    assert "stage 1 of 3: one: finished before, skipped" in capfd.readouterr().out

    Path(
        "two"
    ).unlink()  # a finished stage's output was removed, so it and everything made from it are made again
    run(one, two, three)
    assert Path("log").read_text() == "one two two three two three "


def test_time_by_stage_counts_every_try_and_forgets_what_is_made_again():
    nap = "import time; time.sleep(0.2); "
    first, second, third = (
        stage("one", nap + touch("one")),
        stage("two", nap + touch("two")),
        stage("three", touch("three")),
    )
    with pytest.raises(SystemExit):
        run(first, stage("two", nap + "raise SystemExit(3)"), third)
    failed = pipeline.read_times(FOLDER)
    assert list(failed) == ["one", "two"]
    assert min(failed.values()) >= 0.2

    run(first, second, third)
    done = pipeline.read_times(FOLDER)
    assert done["one"] == failed["one"]  # skipped
    assert done["two"] > failed["two"]
    assert [row.split()[0] for row in pipeline.time_table((first, second, third)).splitlines()] == [
        "Time",
        "one",
        "two",
        "three",
        "together",
    ]

    pipeline.write_times(FOLDER, dict.fromkeys(done, 6000.0))
    Path("two").unlink()
    run(first, second, third)
    times = pipeline.read_times(FOLDER)
    assert times["one"] == 6000.0
    assert max(times[name] for name in ("two", "three")) < 6000.0
    together = pipeline.time_table((first, second, third)).splitlines()[-1]
    assert together.split() == ["together", f"{sum(times.values()) / 60:.1f}", "min"]
    assert sum(times.values()) > 6000.0


def test_a_policy_that_is_trained_again_is_evaluated_again_but_not_the_reverse(
    monkeypatch: pytest.MonkeyPatch,
):
    measure, page = (
        stage("measure", touch("measure"), feeds_later=False),
        stage("page", touch("page"), feeds_later=False, always=True),
    )
    sequence = (stage("data", touch("data")), measure, demo_fit(), stage("export", touch("export")), page)
    monkeypatch.setattr(pipeline.Stage, "run", run_without_training := fake_fit(pipeline.Stage.run))
    run(*sequence)
    assert Path("log").read_text() == "data measure export page "
    assert run_without_training.fits == 1

    Path("measure").unlink()
    run(*sequence)
    assert Path("log").read_text() == "data measure export page measure page "
    assert run_without_training.fits == 1

    Path("data").unlink()
    Path("run/steps.jsonl").write_text("old")
    run(*sequence)
    assert Path("log").read_text() == "data measure export page measure page data measure export page "
    assert run_without_training.fits == 2
    assert not Path("run/steps.jsonl").exists()
    assert Path("run.old-1/steps.jsonl").read_text() == "old"


def test_a_finished_stage_says_how_it_was_run():
    one = stage("one", touch("one"))
    assert one.history() == {"name": "one", "seconds": None, "command": None, "commit": None}
    run(one)
    history = one.history()
    assert shlex.split(history["command"]) == ["python", *one.command()[1:]]
    assert history["seconds"] == pipeline.read_times(FOLDER)["one"]
    assert history["commit"] == pipeline.commit()


def fake_fit(run):
    """Runs every stage but the fit, of which it leaves what a fit leaves."""

    def fake(self):
        if self.run_folder is None:
            run(self)
        else:
            fake.fits += 1
            self.output.parent.mkdir(parents=True)
            self.output.touch()

    fake.fits = 0
    return fake


def test_a_fit_that_was_killed_behind_its_last_checkpoint_is_finished():
    run_folder("config.yaml", "checkpoints/step-000010.ckpt")
    fit = demo_fit()
    assert not fit.is_finished
    run_folder("checkpoints/step-000040.ckpt")  # trainer.max_steps
    assert fit.is_finished


@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("Linux", ()),
        ("Darwin", ("--rollout.engine", "HFEngine")),
        ("Windows", ("--rollout.engine", "HFEngine")),
    ],
)
def test_engine_and_precision_are_those_of_the_machine(
    system, options, in_fp32, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("rpt_lightning.training.cpu_precision.bf16_is_slow", lambda: in_fp32)
    for name in (
        "demo_text",
        "stages",
        "pipeline",
    ):  # what the machine is good at is found out while they are imported
        monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module("demo_text")
    commands = {
        stage.name: stage.command()
        for stage in module.STAGES
        if stage.name.split()[0] not in ("export", "report")
    }
    module.say_what_is_special("demo-text")
    for name in ("evaluate start", "evaluate after cold start", "RPT", "evaluate after RPT"):
        assert ("HFEngine" in commands[name]) == bool(options)
        # A class named behind its arguments would drop them.
        assert " ".join((*options, *(("--rollout.engine.dtype", "float32") if in_fp32 else ()))) in " ".join(
            commands[name]
        )
        assert ("float32" in commands[name]) == ("32-true" in commands[name]) == in_fp32
    assert "HFEngine" not in commands["cold start"]  # it learns from text
    assert ("32-true" in commands["cold start"]) == ("32-true" in commands["prepare"]) == in_fp32
    assert (f"no vLLM for {system}" in capsys.readouterr().out) == bool(options)


def test_the_report_shows_the_table_and_names_the_plot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, right in (("start", False), ("after cold start", False), ("after RPT", True)):
        write_results(
            results(replace(FIRST, reasoning_correct=right), SECOND), demo.results_file(demo.folder_of(name))
        )
    demo.RPT.mkdir(parents=True)
    (demo.RPT / "steps.jsonl").write_text('{"step": 1, "reward/mean": 0.25}\n')
    demo.show()
    output = capsys.readouterr().out
    row = next(line for line in output.splitlines() if "reasoning accuracy" in line)
    assert row.count("50.0 %") == 2
    assert "100.0 %" in row
    assert "runs/demo-text/summary.png" in output
    assert (demo.DEMO / "summary.png").stat().st_size > 1000


def run_folder(*names: str) -> Path:
    for name in names:
        path = Path("run") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Path("run")


@pytest.mark.parametrize(
    ("files", "resumes"),
    [
        (("config.yaml", "checkpoints/step-000010.ckpt"), True),
        (("config.yaml", "checkpoints/x.partial"), False),
    ],
)
def test_a_fit_continues_from_its_last_checkpoint_or_starts_over(files: tuple[str, ...], resumes: bool):
    run_folder(*files)
    command: Callable[[], tuple[str, ...]] = demo_fit().command
    assert (command()[-2:] == ("--ckpt_path", "last")) == resumes


def test_export_takes_the_newest_checkpoint():
    run = run_folder(
        "checkpoints/step-000010.ckpt", "checkpoints/step-000009.ckpt", "checkpoints/step-000011.ckpt.partial"
    )
    assert "run/checkpoints/step-000010.ckpt" in stages.export(run, folder=FOLDER).command()


def test_the_reports_run_has_the_results_of_its_first_and_last_policy():
    run_folder("checkpoints/step-000060.ckpt", "checkpoints/step-000080.ckpt")
    for name, right in (("before", False), ("after", True)):
        write_results(
            results(replace(FIRST, reasoning_correct=right), SECOND), stages.results_file(Path(name))
        )
    page = stages.report(
        Path("run"),
        (Path("other"),),
        Path("report.html"),
        before=Path("before"),
        after=Path("after"),
        folder=FOLDER,
    )
    assert page.command()[1:] == ("report", "run", "other", "--output", "report.html")
    first, last = (read_results(stages.results_file(Path("run"), step)) for step in (0, 80))
    assert (first.step, first.positions[0].reasoning_correct) == (0, False)
    assert (last.step, last.positions[0].reasoning_correct) == (80, True)


def test_each_stage_leaves_something_of_its_own():
    assert (
        len({stage.name for stage in demo.STAGES})
        == len({stage.output for stage in demo.STAGES})
        == len(demo.STAGES)
    )
