"""Accuracy by the corpus's fields, checked with numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rpt_lightning.evaluation.compare_runs import comparison
from rpt_lightning.evaluation.next_token import summary
from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.evaluation.tables.by_field import field_tables
from rpt_lightning.evaluation.tables.stages import Stage
from sample_results import FIRST, results

DEPTHS = [1, 1, 1, 1, 3, 3, None, 10]


def stage(name, right, *, reasons=True, fields=True):
    """Make eight positions: those in ``right`` are right by reasoning, and the first is right without."""
    rows = [
        replace(
            FIRST, task_id=f"d{k}:{k}", doc_id=f"d{k}", position=k,
            reasoning_correct=k in right if reasons else None, ntp_correct=k == 0,
            fields={"depth": depth, "world|kind": "a|b\nc"} if fields and depth is not None else None,
        )
        for k, depth in enumerate(DEPTHS)
    ]  # fmt: skip
    return Stage(name=name, results=results(*rows))


def cells(table, row):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split(" | ")][1:]


def test_a_row_a_value_with_counts_intervals_and_ntp():
    depth, _ = field_tables([stage("one", {0, 1, 2, 7}), stage("two", set(), reasons=False)])
    assert depth.splitlines()[0] == "| by depth | one | two |"
    assert cells(depth, "1 (depth): reasoning") == ["75.0 % [30.1, 95.4] 3/4", "not measured"]
    assert cells(depth, "1: NTP, same positions") == ["25.0 % [4.6, 69.9] 1/4"] * 2
    assert cells(depth, "3 (depth): reasoning")[0].endswith("0/2")
    assert cells(depth, "10 (depth): reasoning")[0].endswith("1/1")
    assert cells(depth, "10: positions") == ["1, 0 unanswerable: ceiling 100.0 %"] * 2
    names = [line.split(" ")[1] for line in depth.splitlines() if "reasoning" in line]
    assert names == ["1", "3", "10"]  # in numeric order


def test_text_is_safe_in_a_table():
    world = field_tables([stage("one", {0})])[1]
    assert world.splitlines()[0] == "| by world\\|kind | one |"
    assert cells(world, "a\\|b c (world\\|kind): reasoning") == ["14.3 % [2.6, 51.3] 1/7"]


def test_results_of_an_earlier_version_take_the_fields_of_the_others():
    depth, _ = field_tables([stage("old", {4}, fields=False), stage("new", {0})])
    assert cells(depth, "3 (depth): reasoning")[0].endswith("1/2")
    assert cells(depth, "1: positions")[0].startswith("4,")
    assert field_tables([stage("old", {4}, fields=False)]) == []


def test_evaluation_and_comparison_show_them():
    stages = [stage("one", {0, 1}), stage("two", {0, 1, 2})]
    assert "| 3 (depth): reasoning |" in summary(stages)
    runs = [Run(name=one.name, steps={}, validations={7: one.results}, rollouts={}) for one in stages]
    text = comparison(runs)
    assert cells(text, "1 (depth): reasoning")[1].endswith("3/4")
    assert "by depth" not in comparison(
        [replace(run, validations={7: stage("x", {0}, fields=False).results}) for run in runs]
    )


@pytest.mark.parametrize("label", ["other"])
def test_a_text_with_many_values_has_a_row_for_the_others(label):
    rows = [
        replace(
            FIRST, task_id=f"d{k}:0", doc_id=f"d{k}", fields={"name": f"n{k // 2}"}, reasoning_correct=True
        )
        for k in range(40)
    ]
    (table,) = field_tables([Stage(name="one", results=results(*rows))])
    assert cells(table, f"{label} (name): reasoning")[0].endswith("18/18")
