from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from rpt_lightning.evaluation.run_log import read_rewards
from rpt_lightning.evaluation.summary import summarise
from rpt_lightning.evaluation.tables.stages import Stage, comparison_lines, difficulty_table, stage_table
from sample_results import FIRST, results


def stage(name: str, num_right: int, *, controls: bool = False) -> Stage:
    """Make 100 positions of 50 documents, half of them above 1.5 nats.

    Reasoning is right at the first ``num_right``, NTP at the first 30, and an empty thought at the first 20.
    """
    positions = [
        replace(
            FIRST,
            task_id=f"{index // 2}:{index}",
            doc_id=str(index // 2),
            position=index,
            entropy=2.0 if index % 2 else 1.2,
            answerable=index < 95,
            reasoning_correct=index < num_right,
            ntp_correct=index < 30,
            ntp_logprob=-0.5 if index % 2 else -1.0,
            boxed=index < 90,
            length=4 if index % 2 else 7,
            truncated=False,
            empty_thought_correct=index < 20 if controls else None,
        )
        for index in range(100)
    ]
    return Stage(name=name, results=results(*positions))


def cells(table: str, row: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_each_accuracy_has_its_count_its_interval_and_ntp_beside_it():
    table = stage_table([stage("before", 10), stage("after", 40, controls=True)])
    # Wilson intervals of 10, 40, 30, 20 and 95 of 100, from the closed form.
    assert cells(table, "reasoning accuracy") == ["10.0 % [5.5, 17.4] 10/100", "40.0 % [30.9, 49.8] 40/100"]
    assert cells(table, "NTP accuracy, same positions") == ["30.0 % [21.9, 39.6] 30/100"] * 2
    assert cells(table, "with an empty thought") == ["not measured", "20.0 % [13.3, 28.9] 20/100"]
    assert cells(table, "with a shuffled thought") == ["not measured", "not measured"]
    assert cells(table, "NTP loss (nats)") == ["0.750"] * 2
    assert cells(table, "mean length (tokens)") == ["5.5"] * 2
    assert cells(table, "ceiling (answerable positions)") == ["95.0 % [88.8, 97.8] 95/100"] * 2


def test_bands_hold_the_positions_above_their_threshold():
    table = difficulty_table([stage("after", 40)])
    assert (
        cells(table, "easy (entropy > 0.5): reasoning")
        == cells(table, "medium (entropy > 1.0): reasoning")
        == ["40.0 % [30.9, 49.8] 40/100"]
    )
    assert cells(table, "hard (entropy > 1.5): reasoning")[0].endswith("20/50")
    assert cells(table, "hard: NTP, same positions")[0].endswith("15/50")


def test_each_band_says_how_many_positions_can_be_answered():
    table = difficulty_table([stage("after", 40)])
    assert cells(table, "easy: positions") == ["100, 5 unanswerable: ceiling 95.0 %"]
    assert cells(table, "hard: positions") == ["50, 3 unanswerable: ceiling 94.0 %"]  # the odd ones of 95..99


def test_a_control_that_was_not_measured_everywhere_says_where():
    whole = stage("RPT", 36, controls=True)
    # The control was not measured at 10 positions. There reasoning was right at 6, the empty thought at none.
    gaps = [
        replace(p, empty_thought_correct=None) if 30 <= p.position < 40 else p
        for p in whole.results.positions
    ]
    partly = Stage(name="RPT", results=replace(whole.results, positions=tuple(gaps)))
    assert cells(stage_table([partly]), "with an empty thought") == [
        "22.2 % [14.9, 31.8] 20/90 (measured at 90 of 100)"
    ]
    (line,) = [line for line in comparison_lines([partly]) if "empty thought" in line]
    assert "+11.1 points" in line  # 30 - 20 of 90
    assert "45 documents, 90 positions" in line


def test_an_empty_band_says_so():
    easy_only = Stage(name="s", results=results(replace(FIRST, entropy=0.7)))
    assert cells(difficulty_table([easy_only]), "hard (entropy > 1.5): reasoning") == ["not measured"]


def test_the_last_stage_is_compared_with_all_that_came_before_it():
    lines = comparison_lines([stage("start", 0), stage("cold start", 40), stage("RPT", 36, controls=True)])
    assert [line.split(":")[0] for line in lines] == [
        "- reasoning RPT - reasoning cold start",
        "- reasoning RPT - reasoning start",
        "- reasoning RPT - NTP of the same weights",
        "- reasoning RPT - an empty thought of the same weights",
    ]
    assert "-4.0 points" in lines[0]
    assert "contains 0" in lines[0] or "below 0" in lines[0]
    assert "+36.0 points" in lines[1]
    assert "above 0 (paired bootstrap over 50 documents, 100 positions)" in lines[1]
    assert "+6.0 points" in lines[2]
    assert "+16.0 points" in lines[3]


def test_weights_that_do_not_reason_are_shown_and_not_compared():
    start, reasoner = stage("start", 10), stage("RPT", 40)
    silent = [replace(p, reasoning_correct=None, boxed=None, length=None) for p in start.results.positions]
    baseline = Stage(name="NTP", results=replace(start.results, positions=tuple(silent)))
    table = stage_table([baseline, reasoner])
    assert cells(table, "reasoning accuracy")[0] == cells(table, "mean length (tokens)")[0] == "not measured"
    assert cells(table, "NTP accuracy, same positions")[0].endswith("30/100")
    assert len(comparison_lines([baseline, reasoner])) == 1  # with its own NTP
    assert comparison_lines([start, baseline]) == []


def test_summary_has_a_page_and_a_picture(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        "".join(json.dumps({"step": step, "reward/mean": step / 100}) + "\n" for step in range(1, 26))
    )
    markdown = summarise([stage("start", 5), stage("RPT", 40)], log, tmp_path / "report")
    assert (tmp_path / "report" / "summary.md").read_text() == markdown
    assert "treat positions as independent" in markdown
    assert "mean reward: 0.055 in the first 10 steps, 0.205 in the last 10 of 25" in markdown
    picture = imread(tmp_path / "report" / "summary.png")
    without_log = tmp_path / "without"
    summarise([stage("start", 5), stage("RPT", 40)], None, without_log)
    narrower = imread(without_log / "summary.png")
    assert picture.shape[1] > narrower.shape[1]
    assert np.unique(narrower.reshape(-1, narrower.shape[2]), axis=0).shape[0] > 3  # bars were drawn


def test_a_resumed_run_counts_each_step_once(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 1, "reward/mean": 0.1}\n{"step": 2, "reward/mean": 0.9}\n'
        '{"step": 2, "reward/mean": 0.3}\n{"step": 2, "val": 1}\n'
    )
    curve = read_rewards(log)
    assert (curve.steps, curve.means) == ((1, 2), (0.1, 0.3))
    assert (curve.first(1), curve.last(1), curve.first(10)) == (0.1, 0.3, pytest.approx(0.2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", "line 1: not JSON"),
        ('{"step": 1}\n', "no line holds 'reward/mean'"),
        (None, "no such run log"),
    ],
)
def test_a_log_without_rewards_is_named(tmp_path: Path, text: str | None, message: str):
    log = tmp_path / "log.jsonl"
    if text is not None:
        log.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rewards(log)
