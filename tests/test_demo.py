from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import load_script

demo = load_script("demo")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stage(name: str, code: str):
    return demo.Stage(name=name, command=lambda: (sys.executable, "-c", f"open('log', 'a').write('{name} '); {code}"), output=Path(name), minutes=1)


def touch(name: str) -> str:
    return f"open('{name}', 'w')"


def test_a_failed_demo_continues_with_the_stage_that_failed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(demo, "STAGES", (stage("one", touch("one")), stage("two", "raise SystemExit(3)"), stage("three", touch("three"))))
    with pytest.raises(SystemExit, match=r"stage 2 of 3: two failed \(exit status 3"):
        demo.run_stages()
    assert Path("log").read_text() == "one two "

    monkeypatch.setattr(demo, "STAGES", (demo.STAGES[0], stage("two", touch("two")), demo.STAGES[2]))
    demo.run_stages()
    assert Path("log").read_text() == "one two two three "
    assert "stage 1 of 3: one: finished before, skipped" in capfd.readouterr().out

    Path("two").unlink()  # what a finished stage left behind was removed: it is made again
    demo.run_stages()
    assert Path("log").read_text() == "one two two three two "


def run_folder(*names: str) -> Path:
    for name in names:
        path = Path("run") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Path("run")


@pytest.mark.parametrize(
    ("files", "resumes"), [(("config.yaml", "checkpoints/step-000010.ckpt"), True), (("config.yaml", "checkpoints/x.partial"), False)]
)
def test_a_fit_continues_from_its_last_checkpoint_or_starts_over(files: tuple[str, ...], resumes: bool):
    run = run_folder(*files)
    command: Callable[[], tuple[str, ...]] = demo.fit("fit", run, "c.yaml", 1).command
    assert (command()[-2:] == ("--ckpt_path", "last")) == resumes
    assert (run / "config.yaml").exists() == resumes


def test_export_takes_the_newest_checkpoint():
    run = run_folder("checkpoints/step-000010.ckpt", "checkpoints/step-000009.ckpt", "checkpoints/step-000011.ckpt.partial")
    assert "run/checkpoints/step-000010.ckpt" in demo.export(run).command()


def test_each_stage_leaves_something_of_its_own():
    assert len({stage.name for stage in demo.STAGES}) == len({stage.output for stage in demo.STAGES}) == len(demo.STAGES)
