from __future__ import annotations

import pytest
from synthetic_run import write_run

from rpt_lightning.evaluation.run_reader import read_runs


def test_a_run_is_read_by_step(tmp_path):
    write_run(
        tmp_path / "run", num_steps=30, sampled_steps=(1, 21), accuracies=(0.2, 0.3, 0.4), num_documents=2
    )
    (run,) = read_runs([tmp_path / "run"])
    assert run.name == "run"
    assert list(run.steps) == list(range(1, 31))
    assert list(run.validations) == [0, 15, 30]
    assert run.last_validation.step == 30
    assert list(run.rollouts) == [1, 21]
    steps, tokens = run.series("rollout/tokens")
    assert (steps[-1], set(tokens)) == (30, {3500.0})
    assert run.series("no/such") == ([], [])


def test_any_part_alone_is_a_run(tmp_path):
    for part in ("steps.jsonl", "validation", "rollouts"):
        write_run(tmp_path / part / "run", num_documents=2)
        for path in (tmp_path / part / "run").iterdir():
            if path.name != part:
                path.rename(tmp_path / part / path.name)
        (run,) = read_runs([tmp_path / part / "run"])
        assert [bool(run.steps), bool(run.validations), bool(run.rollouts)] == [
            part == name for name in ("steps.jsonl", "validation", "rollouts")
        ]
    assert read_runs([tmp_path / "rollouts" / "run"])[0].last_validation is None


def test_the_line_that_a_run_is_writing_is_left_out(tmp_path):
    write_run(tmp_path / "run", num_steps=3, num_documents=2)
    with (tmp_path / "run" / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/me')
    assert list(read_runs([tmp_path / "run"])[0].steps) == [1, 2, 3]


def test_names_are_as_short_as_tells_them_apart(tmp_path):
    folders = [tmp_path / "a" / "rpt", tmp_path / "b" / "rpt", tmp_path / "b" / "ntp"]
    for folder in folders:
        write_run(folder, num_steps=1, num_documents=1)
    assert [run.name for run in read_runs(folders)] == ["a/rpt", "b/rpt", "b/ntp"]
    assert [run.name for run in read_runs(folders[1:])] == ["rpt", "ntp"]


def test_bad_folders_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", num_steps=1, num_documents=1)
    with pytest.raises(ValueError, match="at least one run folder"):
        read_runs([])
    with pytest.raises(ValueError, match="none: no such run folder"):
        read_runs([tmp_path / "none"])
    with pytest.raises(ValueError, match=r"empty: holds neither steps\.jsonl nor validation/ nor rollouts/"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(ValueError, match="named twice"):
        read_runs([tmp_path / "run", tmp_path / "run" / ".." / "run"])
    (tmp_path / "run" / "steps.jsonl").write_text('{"stop": 1}\n')
    with pytest.raises(ValueError, match=r"steps\.jsonl line 1: not an object with a step"):
        read_runs([tmp_path / "run"])
