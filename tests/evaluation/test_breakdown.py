"""Tables of one evaluation, checked with numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

from rpt_lightning.evaluation.tables.breakdown import (
    SAMPLING_NOTE,
    cost_table,
    disjoint_table,
    further_comparisons,
    kind_table,
    length_table,
    sampling_table,
)
from rpt_lightning.evaluation.tables.stages import Stage
from rpt_lightning.policy.flops import ModelSize
from sample_results import FIRST, results


def stage(name, *changes, **meta):
    positions = [
        replace(FIRST, task_id=f"d{i}:{i}", doc_id=f"d{i}", position=i, **change)
        for i, change in enumerate(changes)
    ]
    return Stage(name=name, results=replace(results(*positions), **meta))


def cells(table, row):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_each_position_is_in_one_disjoint_band():
    table = disjoint_table(
        [stage("p", *({"entropy": entropy} for entropy in (0.5, 0.50001, 1.0, 1.2, 1.5, 1.6, 9.0)))]
    )
    counts = [cells(table, f"{band} only: positions")[0].split(",")[0] for band in ("easy", "medium", "hard")]
    assert counts == ["2", "2", "2"]  # 0.5 is in no band, because a band begins above its threshold


def test_kinds_that_occur_have_rows():
    kinds = [
        {"token_kind": "word", "reasoning_correct": True},
        {"token_kind": "word"},
        {"token_kind": "space", "ntp_correct": False},
    ]
    table = kind_table([stage("p", *kinds)])
    assert cells(table, "word (true token): reasoning")[0].endswith("1/2")
    assert cells(table, "word: NTP, same positions")[0].endswith("2/2")
    assert cells(table, "space: NTP, same positions")[0].endswith("0/1")
    assert "number" not in table


def test_lengths_fall_into_bins_of_about_equal_size_and_ties_stay_together():
    lengths = [3, 3, 3, 4, 5, 6, 7, 9, None]
    table = length_table(
        stage("p", *({"thought_length": length, "reasoning_correct": length == 3} for length in lengths))
    )
    assert cells(table, "3 tokens")[0].endswith("3/3")
    assert cells(table, "4 tokens")[0].endswith("0/1")
    assert cells(table, "5 to 6 tokens")[0].endswith("0/2")
    assert cells(table, "7 to 9 tokens")[1].endswith("2/2")  # by NTP
    assert cells(table, "no end of thought")[0].endswith("0/1")
    assert length_table(stage("p", {"thought_length": None})) is None


def test_samples_give_avg_and_the_unbiased_pass():
    sampled = stage(
        "p", {"num_samples": 4, "num_correct": 1}, {"num_samples": 4, "num_correct": 3}, temperature=0.8
    )
    table = sampling_table([sampled, stage("none", {}, {})])
    assert cells(table, "temperature; samples per position") == ["0.8; 4", "not measured"]
    assert cells(table, "avg@n")[0].startswith("50.0 %")
    assert cells(table, "pass@1")[0].startswith("50.0 %")
    assert cells(table, "pass@2")[0].startswith("75.0 %")  # (1/2 + 1) / 2
    assert cells(table, "pass@4") == [
        "100.0 % [34.2, 100.0] at 2 positions",
        "not measured",
    ]  # Wilson's of 2 of 2 documents
    assert sampling_table([stage("none", {})]) is None


def test_no_right_sample_is_not_certainty():
    none = stage("p", *[{"num_samples": 8, "num_correct": 0}] * 4)
    three_documents = [
        replace(p, doc_id=p.doc_id if p.position % 2 else "d0") for p in none.results.positions
    ]
    table = sampling_table([replace(none, results=replace(none.results, positions=tuple(three_documents)))])
    # z^2 / (n + z^2) with z = 1.96 and n = 3 documents: d0 (positions 0 and 2), d1 and d3.
    assert cells(table, "avg@n") == cells(table, "pass@8") == ["0.0 % [0.0, 56.1] at 4 positions"]
    assert table.endswith(SAMPLING_NOTE)


def test_what_an_answer_costs_by_hand():
    size = ModelSize(body_params=1000, head_params=100, attention_width=10)
    read = {"context_tokens": 20, "prompt_tokens": 25, "length": 15}
    table = cost_table(
        [stage("p", read, read | {"context_tokens": 30, "prompt_tokens": 35, "length": 5}, model_size=size)]
    )
    # 39 tokens are fed, 780 pairs, and 15 and 5 distributions
    assert cells(table, "FLOPs by reasoning") == [format(2 * 1000 * 39 + 2 * 100 * 10 + 4 * 10 * 780, ".3g")]
    assert cells(table, "FLOPs by NTP") == [format(2 * 1000 * 25 + 2 * 100 + 4 * 10 * (210 + 465) / 2, ".3g")]
    assert cells(table, "reasoning / NTP") == [format(111200 / 63700, ".2f")]
    assert cells(cost_table([stage("old", {})]), "FLOPs by NTP") == ["not measured"]


def test_how_long_a_sampled_answer_is():
    sampled = stage("p", {"num_samples": 4, "sampled_tokens": 30}, {"num_samples": 4, "sampled_tokens": 50})
    assert cells(cost_table([sampled, stage("none", {})]), "a sampled answer (tokens)") == [
        "10.0",
        "not measured",
    ]


def test_samples_are_compared_at_the_same_temperature_only():
    one = stage("one", *[{"num_samples": 2, "num_correct": 0, "ntp_correct": False}] * 2, temperature=0.8)
    two = stage(
        "two", {"num_samples": 2, "num_correct": 2}, {"num_samples": 2, "num_correct": 1}, temperature=0.8
    )
    ntp, avg = further_comparisons([one, two])
    assert "NTP two - NTP one: +100.0 points" in ntp
    assert "avg@2 two - one: +75.0 points" in avg
    hotter = replace(two, results=replace(two.results, temperature=1.0))
    assert len(further_comparisons([one, hotter])) == 1
