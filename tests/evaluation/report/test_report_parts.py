"""Accuracy points, tables and the embedded rollouts, checked with hand-made numbers."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import replace

import pytest
from hand_made import POLICY, position, run, shares

from rpt_lightning.evaluation.report.accuracy import accuracy_points, reasoning_minus_ntp
from rpt_lightning.evaluation.report.rollout_data import (
    IMPOSSIBLE,
    compress_json,
    num_thought_tokens,
    outcome,
    spread,
    step_data,
)
from rpt_lightning.evaluation.report.tables import difficulty_table, pattern_tables, run_table
from rpt_lightning.evaluation.tables.stages import Rate
from rpt_lightning.records.rollout_samples import RolloutSample
from sample_results import results

SAMPLE = RolloutSample(
    task_id="a:3", context="2 + 2 =", truth=(" 4", "."), thought="hm</think>",
    completion="hm</think>\\boxed{ 4}", prediction=" 4", reward=1.0,
    finish_reason="stop", policy_version=3, tokens=("hm", "</think>", "\\boxed{", " 4}", "<end>"),
    logprobs=(-0.5, -0.004, -0.006, -2.0, 0.0), entropy=1.2,
)  # fmt: skip


def test_bands_are_nested_and_unmeasured_positions_count_for_ntp_only():
    points = {band: accuracy_points({7: POLICY}, band) for band in ("all", "easy", "medium", "hard")}
    assert [(p[0].reasoning, p[0].ntp) for p in points.values()] == [
        (Rate(2, 3), Rate(3, 4)),
        (Rate(2, 3), Rate(3, 4)),
        (Rate(1, 2), Rate(2, 3)),
        (Rate(0, 1), Rate(2, 2)),
    ]
    assert points["hard"][0].step == 7
    assert accuracy_points({7: results(position("a1", 0.6, True, True))}, "hard") == []


def test_the_difference_is_of_positions_where_both_were_measured():
    difference = reasoning_minus_ntp(POLICY)
    assert (difference.first, difference.second, difference.num_positions, difference.num_units) == (
        2 / 3,
        2 / 3,
        3,
        2,
    )
    assert reasoning_minus_ntp(POLICY, "hard").difference == -1.0
    assert reasoning_minus_ntp(results(position("b2", 2.0, None, True))) is None


def test_difficulty_table():
    table = difficulty_table(run("one", validations=[POLICY]))
    assert table.caption == "one at step 7"
    assert [row[:2] for row in table.rows] == [
        ["all positions", "4"], ["easy (entropy > 0.5 nats)", "4"], ["medium (entropy > 1.0 nats)", "3"],
        ["hard (entropy > 1.5 nats)", "2"]
    ]  # fmt: skip
    assert [row[-1] for row in table.rows] == ["75.0 %", "75.0 %", "66.7 %", "100.0 %"]
    assert table.rows[3][3] == "100.0 % [34.2, 100.0] 2/2"
    assert difficulty_table(run("none")) is None


def test_runs_side_by_side():
    steps = {
        1: {"reward/mean": 0.1, "time/step_s": 1800.0, "rollout/tokens": 1200.0},
        2: {"reward/mean": 0.3, "time/step_s": 1800.0, "rollout/tokens": 34.0},
    }
    table = run_table([run("one", steps=steps, validations=[POLICY]), run("two")])
    rows = {name: cells for name, *cells in table.rows}
    assert table.columns == ["", "one", "two"]
    assert rows["steps logged"] == ["2", "0"]
    assert rows["time of all steps"] == ["1.00 h, 1800.0 s per step", "not logged"]
    assert rows["tokens sampled"] == ["1,234", "not logged"]
    assert rows["accuracy by NTP"] == ["75.0 % [30.1, 95.4] 3/4", "not measured"]
    assert rows["NTP loss"] == ["0.500 nats", "not measured"]
    assert rows["completion length"] == ["16.0 tokens", "not measured"]


def test_pattern_tables_give_the_relative_change():
    patterns = {"one": {1: shares(10), 5: shares(20), 9: shares(26)}, "two": {3: shares(13)}, "none": {}}
    first, against = pattern_tables(patterns)
    assert first.columns == ["pattern: its keywords", "step 1", "step 9", "relative change"]
    hypothesis, deduction = first.rows[3], first.rows[5]
    assert hypothesis[0] == "hypothesis: probably, something like"
    assert hypothesis[-1] == "+160.0 %"
    assert deduction[-1] == "none in both"
    assert against.columns == ["pattern", "one", "two", "relative change"]
    assert against.rows[3][-1] == "-50.0 %"


@pytest.mark.parametrize(
    ("steps", "number", "expected"),
    [([], 3, []), ([4], 2, [4]), ([1, 2, 3], 3, [1, 2, 3]), (list(range(0, 101, 10)), 3, [0, 50, 100]),
    ([1, 2, 3, 4], 2, [1, 4])]
)  # fmt: skip
def test_steps_are_spread_evenly(steps, number, expected):
    assert spread(steps, number) == expected


def test_outcomes():
    assert outcome(SAMPLE) == 0
    assert outcome(replace(SAMPLE, reward=0.9)) == 1  # a dense reward for a wrong first token
    assert outcome(replace(SAMPLE, reward=0.0, finish_reason="length")) == 2


@pytest.mark.parametrize(
    ("tokens", "thought", "expected"),
    [
        (("hm", "</think>", "\\boxed{", "x}"), "hm</think>", 2),
        (("hm", "</think>\\b", "oxed{x}"), "hm</think>", 1),
        (("", "é", "", "x"), "é", 3),
        (("a", "b"), "ab", 2),
        (("a", "b"), "", 0),
    ],
)
def test_where_the_answer_begins(tokens, thought, expected):
    assert num_thought_tokens(tokens, thought) == expected


def test_a_log_prob_that_is_not_finite_is_as_good_as_impossible():
    """A server says NaN for -inf. Neither is JSON, and a single one would prevent the page."""
    odd = replace(SAMPLE, logprobs=(float("nan"), float("-inf"), -0.006, -2.0, 0.0))
    assert step_data([odd])["tasks"][0]["r"][0]["l"] == [IMPOSSIBLE, IMPOSSIBLE, 1, 200, 0]


def test_rollouts_are_grouped_by_task_and_survive_the_packing():
    old = replace(
        SAMPLE, task_id="b:1", tokens=None, logprobs=None, entropy=None, prediction=None, reward=0.0
    )
    data = step_data([SAMPLE, replace(SAMPLE, reward=0.0), old])
    assert [(task["id"], len(task["r"])) for task in data["tasks"]] == [("a:3", 2), ("b:1", 1)]
    packed = compress_json(data)
    assert set(packed).isdisjoint("<>&")
    assert packed == compress_json(data)
    unpacked = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert unpacked["tasks"][0] == {
        "id": "a:3", "c": "2 + 2 =", "t": [" 4", "."], "e": 1.2, "r": [
            {"o": 0, "p": " 4", "w": 1.0, "v": 3, "k": ["hm", "</think>", "\\boxed{", " 4}", "<end>"],
            "l": [50, 0, 1, 200, 0], "n": 2},
            {"o": 1, "p": " 4", "w": 0.0, "v": 3, "k": ["hm", "</think>", "\\boxed{", " 4}", "<end>"],
            "l": [50, 0, 1, 200, 0], "n": 2},
        ],
    }  # fmt: skip
    assert unpacked["tasks"][1]["r"] == [
        {"o": 1, "p": None, "w": 0.0, "v": 3, "h": "hm</think>", "a": "\\boxed{ 4}"}
    ]
