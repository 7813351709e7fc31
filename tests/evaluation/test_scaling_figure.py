"""The scaling figure recovers a law from invented validations, and says what a fit lacks."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from rpt_lightning.evaluation.report.figures import scaling as report_figure
from rpt_lightning.evaluation.run_reader import read_run
from rpt_lightning.evaluation.scaling.figure import scaling, scaling_curves
from rpt_lightning.records.results import write_results
from sample_results import FIRST, results

STEPS = (1, 2, 4, 8, 10, 12)
FLOPS = 1e15  # for each step


@pytest.fixture
def folder(tmp_path):
    """Make a run of 12 steps whose accuracy at 400 easy positions is 0.5 - 0.2 / step.

    At the hard half of them it is lower by 0.1.
    """
    run = tmp_path / "run"
    run.mkdir()
    (run / "steps.jsonl").write_text(
        "".join(json.dumps({"step": step, "cost/flops": FLOPS}) + "\n" for step in range(1, 13))
    )
    for step in (0, *STEPS):
        accuracy = 0.5 - 0.2 / step if step else 0.0
        positions = []
        for index in range(400):
            hard = index % 2
            rank = (index // 2 + 0.5) / 200
            right = rank < accuracy - (0.05 if hard else -0.05)
            positions.append(
                replace(
                    FIRST,
                    task_id=f"{index // 4}:{index}",
                    doc_id=str(index // 4),
                    position=index,
                    entropy=2.0 if hard else 0.7,
                    reasoning_correct=right,
                )
            )
        write_results(replace(results(*positions), step=step), run / "validation" / f"step-{step:06d}.jsonl")
    return run


def test_the_law_is_found_again(folder):
    curves = {curve.band: curve for curve in scaling_curves(read_run(folder))}
    assert set(curves) == {
        "easy",
        "medium, hard",
    }  # if the medium band holds no position that is easier than hard
    easy, hard = curves["easy"], curves["medium, hard"]
    assert easy.steps == STEPS
    assert easy.compute == tuple(step * FLOPS for step in STEPS)
    assert [rate.count for rate in (easy.rates[0], hard.rates[0])] == [400, 200]
    assert easy.fit.alpha == pytest.approx(1.0, abs=0.15)
    assert easy.fit.limit == pytest.approx(0.5, abs=0.02)
    assert hard.fit.limit == pytest.approx(0.45, abs=0.02)
    assert easy.interval.limit[0] <= easy.fit.limit <= easy.interval.limit[1]
    compute, accuracy = easy.points()
    assert (compute[0], compute[-1]) == (pytest.approx(FLOPS), pytest.approx(12 * FLOPS))
    assert np.all(np.diff(accuracy) > 0)


def test_the_command_writes_picture_and_numbers(folder, tmp_path, capsys):
    output = tmp_path / "new" / "scaling.png"
    scaling([folder], output=output)
    assert imread(output).shape[:2] == (600, 840)
    text = output.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert "| 12, 1.2e+16: reasoning |" in text
    assert "| 12: NTP, same positions | 100.0 % [99.0, 100.0] 400/400 |" in text
    assert "- medium, hard: alpha" in text
    assert "- easy: the power law describes the checkpoints best" in text
    assert "100 documents" in text


def test_the_report_draws_the_law_or_says_what_it_lacks(folder):
    run = read_run(folder)
    figure = report_figure(run)
    assert [trace["name"] for trace in figure.spec["data"]][:3] == [
        "easy, law",
        "easy (&gt; 0.5 nats)",
        "easy, NTP",
    ]
    assert figure.spec["data"][2]["y"] == [100.0] * len(STEPS)
    assert figure.spec["layout"]["xaxis"]["type"] == "log"
    assert "R2" in figure.note
    few = replace(run, validations={step: run.validations[step] for step in (0, 1, 2)})
    assert (
        "No law is fitted. run: only 2 of the steps after the start were validated, but the fit needs 4"
        in report_figure(few).note
    )


def test_what_cannot_be_fitted_is_one_clear_error(folder):
    run = read_run(folder)
    with pytest.raises(ValueError, match="do not say what they cost"):
        scaling_curves(replace(run, steps={}))
    last = run.validations[12]
    without = replace(last, positions=tuple(replace(p, reasoning_correct=None) for p in last.positions))
    with pytest.raises(ValueError, match="without reasoning accuracy"):
        scaling_curves(replace(run, validations=run.validations | {12: without}))
