"""The committed record of a seed reads back as it was measured.

Summaries of several seeds agree with hand-computed numbers.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rpt_lightning.evaluation.reproduction.record import SeedRecord, measured, read_record, write_record
from rpt_lightning.evaluation.reproduction.summary import (
    BEGIN,
    END,
    band_table,
    replace_section,
    seed_summary,
)
from rpt_lightning.evaluation.scaling.figure import scaling_curves
from rpt_lightning.records.results import Results
from sample_results import FIRST

ABOUT = {
    "machine": "a CPU",
    "precision": "fp32",
    "cold_start_sha256": "f00",
    "cold_start_flops": 3e12,
    "learning_rates": [2e-5, 1e-5],
    "ntp_passes": 2.5,
    "shared_stages": [{"name": "cold start", "seconds": 60.0, "commit": "abc"}],
    "stages": [
        {"name": "RPT", "seconds": 90.0, "commit": "def"},
        {"name": "NTP", "seconds": 30.0, "commit": "abc"},
    ],
}
CONTINUAL = "NTP after continual NTP from the cold start, at RPT's FLOPs"
# Four documents of ten positions. The first two documents are hard, the others only easy.
ENTROPY = (2.0, 1.75, 0.7, 0.500001)


def answers(*, reasoning: int | None, ntp: int) -> Results:
    """Make outcomes that are right at the given number of first positions of each document."""
    positions = tuple(
        replace(
            FIRST,
            task_id=f"doc-{document}:{position}",
            doc_id=f"doc-{document}",
            position=position,
            entropy=ENTROPY[document],
            token_kind="number" if position % 2 else "space",
            answerable=position != 9,
            reasoning_correct=None if reasoning is None else position < reasoning,
            ntp_correct=position < ntp,
            ntp_logprob=-1.2344 - position,
            boxed=None if reasoning is None else position != 8,
            truncated=None if reasoning is None else False,
            length=None if reasoning is None else 10 + position,
            empty_thought_correct=None if reasoning is None or position == 3 else False,
            shuffled_thought_correct=None,
        )
        for document in range(4)
        for position in range(10)
    )
    return Results(positions=positions, policy_path="models/p", step=0)


def record(seed: int, *, after: int = 5) -> SeedRecord:
    return SeedRecord(
        seed=seed,
        about=ABOUT,
        measured=(
            measured("start", answers(reasoning=0, ntp=4), step=0, flops=0.0),
            measured("cold start", answers(reasoning=2, ntp=3), step=0, flops=0.0),
            *(
                measured(
                    "RPT",
                    replace(answers(reasoning=min(step, after), ntp=4), step=step),
                    step=step,
                    flops=1e12 * step,
                )
                for step in (1, 2, 4, 8)
            ),
            measured("continual NTP", answers(reasoning=None, ntp=6), step=30, flops=8.5e12),
        ),
    )


def test_a_record_comes_back(tmp_path):
    path = tmp_path / "seed-3.json"
    write_record(record(3), path)
    again = read_record(path)
    assert (again.seed, again.about) == (3, ABOUT)
    kept = (
        "task_id",
        "doc_id",
        "position",
        "entropy",
        "answerable",
        "token_kind",
        "reasoning_correct",
        "ntp_correct",
        "boxed",
        "truncated",
    )
    kept += ("empty_thought_correct", "shuffled_thought_correct")
    for one, other in zip(again.measured, record(3).measured, strict=True):
        assert (one.policy, one.step, one.flops, one.mean_length) == (
            other.policy,
            other.step,
            other.flops,
            other.mean_length,
        )
        for p, q in zip(one.results.positions, other.results.positions, strict=True):
            assert [getattr(p, name) for name in kept] == [getattr(q, name) for name in kept]
            assert p.ntp_logprob == pytest.approx(q.ntp_logprob, abs=5e-4)
    assert again.measured[0].mean_length == 14.5


def test_two_thousand_positions_are_small(tmp_path):
    """The record has seven policies, and the names of its documents have 40 characters."""
    many = [
        replace(p, doc_id=f"sympy.core.some.module.Class.{p.doc_id}", task_id=f"{p.task_id}/{n}")
        for n in range(50)
        for p in answers(reasoning=1, ntp=1).positions
    ]
    whole = replace(
        record(0),
        measured=tuple(
            replace(one, results=replace(one.results, positions=tuple(many))) for one in record(0).measured
        ),
    )
    write_record(whole, tmp_path / "r.json")
    assert (tmp_path / "r.json").stat().st_size < 300_000


def test_policies_of_other_positions_are_not_written(tmp_path):
    mixed = record(0)
    fewer = replace(mixed.measured[1].results, positions=mixed.measured[1].results.positions[1:])
    with pytest.raises(ValueError, match="different positions"):
        write_record(
            replace(mixed, measured=(mixed.measured[0], replace(mixed.measured[1], results=fewer))),
            tmp_path / "r.json",
        )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda parts: parts.pop("policies"),
        lambda parts: parts.update(format=99),
        lambda parts: parts["position"].pop(),
        lambda parts: parts["policies"][0].update(ntp_correct="01"),
        lambda parts: parts["policies"][0].update(ntp_correct="x" * 40),
    ],
    ids=[
        "a part is missing",
        "another format",
        "a position is missing",
        "outcomes are missing",
        "an unknown outcome",
    ],
)
def test_a_spoilt_record_is_one_clear_error(spoil, tmp_path):
    path = tmp_path / "seed-0.json"
    write_record(record(0), path)
    parts = json.loads(path.read_text())
    spoil(parts)
    path.write_text(json.dumps(parts))
    with pytest.raises(ValueError, match=r"seed-0.json: not the record of a seed"):
        read_record(path)


def rows(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells}


def test_one_seed_by_hand():
    table = rows(band_table([record(0)], "hard"))
    assert table["hard: entropy > 1.5, 20 positions of 2 documents"] == ["seed 0"]
    assert table["reasoning before RPT"] == ["20.0 % [8.1, 41.6] 4/20"]
    assert table["reasoning after RPT"][0].startswith("50.0 % ")
    assert table["NTP of the untrained model"][0].startswith("40.0 % ")
    assert table["NTP before RPT"][0].startswith("30.0 % ")
    assert table[CONTINUAL][0].startswith("60.0 % ")
    # Every document has the same gain, so no resample differs.
    assert table["reasoning after RPT - reasoning before RPT"] == ["+30.0 [+30.0, +30.0] above 0"]
    assert table[f"reasoning after RPT - {CONTINUAL}"] == ["-10.0 [-10.0, -10.0] below 0"]
    # A position at 0.500001 nats is easy.
    assert "easy: entropy > 0.5, 40 positions of 4 documents" in rows(band_table([record(0)], "easy"))


def test_seeds_are_averaged_a_position_and_their_spread_is_shown():
    """For gains of 30 and 60 points, Student's interval is 45 +- 12.706 * 21.21 / sqrt(2)."""
    table = rows(band_table([record(0, after=5), record(1, after=8)], "medium"))
    assert table["medium: entropy > 1.0, 20 positions of 2 documents"] == ["seed 0", "seed 1", "over seeds"]
    assert table["reasoning after RPT"][2] == "mean 65.0 %, from 50.0 to 80.0"
    assert table["reasoning before RPT"][2] == "one measurement"
    assert table["reasoning after RPT - reasoning before RPT"] == [
        "+30.0 [+30.0, +30.0] above 0",
        "+60.0 [+60.0, +60.0] above 0",
        "+45.0; documents [+45.0, +45.0] above 0; runs [-145.6, +235.6] contains 0",
    ]


def test_accuracies_take_the_positions_of_a_document_together():
    """One document is all right and another all wrong.

    The interval is that of two documents, not of twenty positions (Wilson for 1 of 2: 9.5 to 90.5 %).
    """
    base = record(0)
    split = tuple(
        replace(p, reasoning_correct=p.doc_id == "doc-0") for p in base.measured[0].results.positions
    )
    halves = replace(
        base,
        measured=tuple(replace(one, results=replace(one.results, positions=split)) for one in base.measured),
    )
    assert rows(band_table([halves], "hard"))["reasoning after RPT"] == ["50.0 % [9.5, 90.5] 10/20"]


def test_the_interval_over_documents_is_that_of_the_averaged_outcomes():
    """One document of 10 gains everything in both seeds.

    The mean gain is 10 points, and a resample holds that document 0, 1, 2 ... times.
    """

    def lucky(seed):
        base = record(seed)
        positions = [
            replace(p, task_id=f"d{d}", doc_id=f"d{d}", entropy=2.0, reasoning_correct=False)
            for d, p in enumerate(base.measured[0].results.positions[:10])
        ]
        lucky_positions = [replace(p, reasoning_correct=p.doc_id == "d0") for p in positions]
        return replace(
            base,
            measured=tuple(
                replace(
                    one,
                    results=replace(
                        one.results, positions=tuple(lucky_positions if one.policy == "RPT" else positions)
                    ),
                )
                for one in base.measured
            ),
        )

    row = rows(band_table([lucky(0), lucky(1)], "hard"))["reasoning after RPT - reasoning before RPT"]
    alone = "+10.0 [+0.0, +30.0] contains 0"
    assert row == [alone, alone, "+10.0; documents [+0.0, +30.0] contains 0; runs [+10.0, +10.0] above 0"]


def test_the_whole_summary(monkeypatch):
    monkeypatch.setattr("rpt_lightning.evaluation.scaling.figure._NUM_RESAMPLES", 20)
    assert seed_summary([]) == "No seed has been run yet.\n"
    text = seed_summary([record(1, after=8), record(0)])
    assert text.startswith("2 seeds, 40 held-out positions of 4 documents")
    assert "| seed 0 | seed 1 |" in text  # sorted, whatever the order of the input
    assert "| RPT: model FLOPs, rollouts included | 8e+12 | 8e+12 |" in text
    assert "| continual NTP: passes over the training text | 2.5 | 2.5 |" in text
    assert "| minutes of this seed alone | 2 | 2 |" in text
    assert "| commits of the stages | abc, def | abc, def |" in text
    assert "| learning rate: RPT, continual NTP | 2e-05, 1e-05 | 2e-05, 1e-05 |" in text
    assert "| cold start, before both: model FLOPs | 3e+12 | 3e+12 |" in text
    for curve in scaling_curves(record(0).as_run()):
        assert curve.compute == (1e12, 2e12, 4e12, 8e12)
        assert [rate.mean for rate in curve.rates] == [0.1, 0.2, 0.4, 0.5]
        assert f"- {curve.text()}" in text


def test_seeds_of_other_positions_are_refused():
    other = record(1)
    moved = tuple(
        replace(
            one,
            results=replace(
                one.results, positions=tuple(replace(p, entropy=p.entropy + 1) for p in one.results.positions)
            ),
        )
        for one in other.measured
    )
    with pytest.raises(ValueError, match="seeds 0 and 1 were measured at different positions"):
        seed_summary([record(0), replace(other, measured=moved)])


def test_seeds_of_another_cold_start_or_length_are_refused():
    with pytest.raises(ValueError, match=r"seeds 0 and 1 differ in their cold start \(f00 and f11\)"):
        seed_summary([record(0), replace(record(1), about=ABOUT | {"cold_start_sha256": "f11"})])
    shorter = tuple(one for one in record(1).measured if one.step != 8)
    with pytest.raises(ValueError, match=r"seeds 0 and 1 differ in their number of steps \(8 and 4\)"):
        seed_summary([record(0), replace(record(1), measured=shorter)])


def test_what_was_not_measured_is_not_wrong():
    base = record(0)
    without = tuple(
        replace(one, results=answers(reasoning=None, ntp=4)) if (one.policy, one.step) == ("RPT", 8) else one
        for one in base.measured
    )
    with pytest.raises(
        ValueError, match="seed 0: reasoning after RPT was not measured at 20 of 20 positions"
    ):
        band_table([replace(base, measured=without)], "hard")


def test_only_the_section_between_the_markers_changes():
    assert (
        replace_section(f"a\n{BEGIN}\nold\n{END}\nb\n", "new\n", where="x.md")
        == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    )
    for text in ("a", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"):
        with pytest.raises(ValueError, match=r"x\.md: needs the line"):
            replace_section(text, "new\n", where="x.md")
