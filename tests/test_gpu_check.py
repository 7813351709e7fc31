"""The parts of `make gpu-check` that run without a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rpt_lightning.policy.attention import block_mask

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)


def record(folder: Path, part: str) -> dict:
    return json.loads((folder / f"{part}.json").read_text())


def test_the_environment_is_stored(tmp_path):
    assert gpu_check.main(["environment", "--output", str(tmp_path)]) == 0
    found = record(tmp_path, "environment")["found"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["host_bytes"] > 2**28


def test_a_failure_is_stored_and_the_next_part_runs(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no plan today")

    monkeypatch.setitem(gpu_check.PARTS, "plan", broken)
    assert gpu_check.main(["plan", "environment", "--output", str(tmp_path)]) == 1
    failed = record(tmp_path, "plan")
    assert (failed["outcome"], failed["why"]) == ("failed", "no plan today")
    assert "broken" in failed["traceback"]
    assert record(tmp_path, "environment")["outcome"] == "passed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_parts_that_need_a_gpu_say_so(tmp_path):
    assert gpu_check.main([*gpu_check.NEED_GPU, "--output", str(tmp_path)]) == 0
    for part in gpu_check.NEED_GPU:
        assert record(tmp_path, part)["outcome"] == "skipped"
        assert "needs a GPU" in record(tmp_path, part)["why"]


def test_trees_are_compared(monkeypatch):
    """On a CPU the kernel is not compiled. A wrong one is noticed."""
    assert max(gpu_check.trees("cpu")["largest_difference"].values()) < 1e-4
    right = block_mask.flex
    monkeypatch.setattr(block_mask, "flex", lambda *inputs, **settings: 2 * right(*inputs, **settings))
    with pytest.raises(AssertionError, match="flex_attention differs from plain attention"):
        gpu_check.trees("cpu")


def test_the_plan_is_stored(tmp_path):
    assert gpu_check.main(["plan", "--output", str(tmp_path)]) == 0
    found = record(tmp_path, "plan")["found"]
    assert any("host memory" in line for line in found["with offload"])
    assert not any("host memory: " in line for line in found["without offload"])


def test_an_unknown_part_is_an_error(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["plans"])
    assert "there is no part plans; choose from environment" in capsys.readouterr().err
