"""The notebook of the testbed runs from its first cell to its last and shows what it promises."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "testbed.ipynb"


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells)


@pytest.mark.long
@pytest.mark.vllm
def test_it_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    (comparison,) = (text for text in texts if text.startswith("before: "))
    before, after = re.findall(r"(\d+) of (\d+) right by reasoning", comparison)
    assert before[1] == after[1] == "300"
    assert int(before[0]) < 100
    assert int(after[0]) > 250
