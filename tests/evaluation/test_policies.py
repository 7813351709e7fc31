"""Names of policies, which are also names of folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpt_lightning.evaluation.policies import check_policies, policy_names


@pytest.mark.parametrize(
    ("policies", "names"),
    [
        (["models/p", "runs/a/checkpoints/step-000040.ckpt"], ["p", "step-000040"]),
        (["org/q", "other/q"], ["org/q", "other/q"]),  # hub ids
        (["/p", "/models/p"], ["p", "models/p"]),  # the whole first path is an ending of the second
        (["x/step-1", "x/step-1.ckpt"], ["step-1", "step-1.ckpt"]),
        (["x/step-1", "y/step-1.ckpt"], ["x/step-1", "y/step-1"]),
        (["runs/../p"], ["p"]),
        (["../p", "p"], ["above/p", "here/p"]),
        (["..", "."], ["above", "here"]),
    ],
)
def test_names_are_short_and_lie_below_the_output(
    policies: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert policy_names(policies) == names
    for name in names:
        assert (here / "output" / name).resolve().is_relative_to(here / "output")


def test_a_policy_that_is_named_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "p").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "p")
    for again in ("models/p", "./models/p", str(tmp_path / "models" / "p"), "link"):
        with pytest.raises(ValueError, match=r"--policy models/p .*: one is named twice"):
            check_policies(["models/p", again])
    check_policies(["org/q", "other/q", "models/p"])
