from __future__ import annotations

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import scaling_table

    return scaling_table


def test_the_document_shows_what_the_plan_says(table, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["scaling_table.py", "--check"])
    table.main()
    stale = tmp_path / "stale.md"
    stale.write_text(f"text\n{table.BEGIN}\nother tables\n{table.END}\n")
    monkeypatch.setattr(table, "DOCUMENT", stale)
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "plans", list)
    monkeypatch.setattr(sys, "argv", ["scaling_table.py", "--check"])
    with pytest.raises(SystemExit, match=r"stale.md: not the plan's tables"):
        table.main()


def test_a_document_without_marks_is_refused(table):
    with pytest.raises(ValueError, match="a line is missing"):
        table.with_tables("text", "tables")
