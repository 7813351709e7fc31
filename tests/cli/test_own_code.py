"""Errors of a user's own classes keep their traceback. A wrong flag gives one line and where to find help."""

from __future__ import annotations

import re
import sys

import pytest

from rpt_lightning.cli import command as cli


def fails_in(tmp_path, monkeypatch, text, *, installed=False):
    """A command that ends in ``text`` in a module of the user's own, or in one that is installed."""
    folder = tmp_path / ("site-packages" if installed else "mine")
    folder.mkdir()
    (folder / "own_module_for_test.py").write_text(f"def fail(*args, **kwargs):\n    {text}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "own_module_for_test", raising=False)
    import own_module_for_test

    monkeypatch.setattr(cli, "_run_tool", own_module_for_test.fail)


def test_an_exception_of_the_users_own_keeps_its_traceback(tmp_path, monkeypatch):
    fails_in(tmp_path, monkeypatch, "raise ValueError('mine')")
    with pytest.raises(ValueError, match="mine"):
        cli.main(["compare"])


def test_also_where_a_library_raised_it_for_the_users_own_code(tmp_path, monkeypatch):
    fails_in(tmp_path, monkeypatch, "import json; json.loads('{')")
    with pytest.raises(ValueError, match="Expecting property name"):
        cli.main(["compare"])


def test_an_error_of_a_library_is_one_line(tmp_path, monkeypatch, capsys):
    fails_in(tmp_path, monkeypatch, "raise ValueError('theirs')", installed=True)
    assert cli.main(["compare"]) == 1
    assert capsys.readouterr().err == "rpt: error: theirs\n"


@pytest.mark.parametrize("text", ["{}['theirs']", "[][3]", "None.theirs", "import theirs"])
def test_an_error_of_another_kind_in_a_library_is_one_line_that_says_where(
    text, tmp_path, monkeypatch, capsys
):
    fails_in(tmp_path, monkeypatch, text, installed=True)
    assert cli.main(["compare"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rpt: error: own_module_for_test failed in main (rpt_lightning/cli/command.py): ")
    assert "theirs" in line or "IndexError" in line
    assert "RPT_TRACEBACK=1" in line


def test_an_error_of_another_kind_in_our_own_code_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_MODULES", {})
    with pytest.raises(KeyError):
        cli.main(["compare"])


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("fit", "--trainer.no_such_flag"),
        ("fit", "--rollout.group_size"),
        ("prepare", "--no_such_flag"),
        ("compare", "--no_such_flag"),
    ],
)
def test_a_wrong_flag_is_named_first_and_without_the_usage(command, flag, rpt):
    status, shown = rpt(command, flag, "many")
    lines = [line for line in shown.splitlines() if line.strip()]
    assert status == 2
    assert lines[0].startswith("rpt: error: ")
    assert lines[-1] == f"What can be set: rpt {command} --help"
    assert "usage:" not in shown
    assert len(lines) < 12
    assert flag.removeprefix("--") in shown


def test_a_closed_output_ends_nothing(monkeypatch):
    """As `rpt ... >&-` has it: Python's streams are None."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["--version"]) == 0
    assert cli.main(["no such command"]) == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"val_check_interval": 0},
            "--trainer.val_check_interval 0: give a number above 0; "
            "for no validation give --trainer.limit_val_batches 0",
        ),
        ({"val_check_interval": -0.5}, "--trainer.val_check_interval -0.5"),
        ({"check_val_every_n_epoch": 0}, "--trainer.check_val_every_n_epoch 0: give a number 1 or more"),
        ({"devices": -2}, "--trainer.devices -2: give how many, 1 or more, or -1 for all GPUs"),
        ({"devices": "-4"}, "--trainer.devices -4"),
        ({"devices": 0}, "--trainer.devices 0"),
        ({"num_nodes": 0}, "--trainer.num_nodes 0"),
    ],
)
def test_numbers_that_lightning_would_stumble_over(config, said):
    from rpt_lightning.cli.run import _check_trainer

    with pytest.raises(ValueError, match=re.escape(said)):
        _check_trainer(config)


def test_numbers_that_it_takes():
    from rpt_lightning.cli.run import _check_trainer

    for devices in ("auto", 1, -1, "2", [0, 1], "0,1"):
        _check_trainer(
            {"devices": devices, "val_check_interval": 0.5, "check_val_every_n_epoch": None, "num_nodes": 1}
        )
