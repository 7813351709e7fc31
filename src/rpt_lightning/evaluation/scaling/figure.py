"""`rpt scaling`: reasoning accuracy at a run's checkpoints against the FLOPs of training.

The fitted law is shown for the paper's three difficulties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rpt_lightning.evaluation.run_cost import FLOPS, total
from rpt_lightning.evaluation.run_reader import Run, read_runs
from rpt_lightning.evaluation.scaling.law import (
    MIN_POINTS,
    ScalingFit,
    ScalingInterval,
    bootstrap_scaling,
    compare_laws,
    fit_scaling,
)
from rpt_lightning.evaluation.tables.stages import Rate, above, markdown_row
from rpt_lightning.metrics.difficulty_bands import BANDS
from rpt_lightning.records.results import PositionResult, pair_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CURVE_POINTS = 60
_NUM_RESAMPLES = 300


@dataclass(frozen=True, kw_only=True)
class ScalingCurve:
    """One band of one run: its checkpoints [C], and the fitted law with intervals over documents.

    If several difficulties hold the same positions, ``band`` names all of them. ``threshold`` is their
    lowest entropy, in nats.
    """

    band: str
    threshold: float
    steps: tuple[int, ...]
    compute: tuple[float, ...]
    rates: tuple[Rate, ...]
    ntp_rates: tuple[Rate, ...]  # NTP of the same weights at the same positions
    fit: ScalingFit
    interval: ScalingInterval

    def points(self) -> tuple[list[float], list[float]]:
        """Return compute values (FLOPs) from the first to the last checkpoint, and the law's accuracies."""
        compute = np.geomspace(min(self.compute), max(self.compute), _CURVE_POINTS)
        return compute.tolist(), self.fit.predict(compute).tolist()

    def text(self) -> str:
        """Describe the law with its intervals.

        If there is no clear law, the text gives the reason instead, so that nobody quotes its parameters.
        """
        number = len(self.compute)
        if doubt := self.fit.doubt or self.interval.doubt:
            return f"{self.band}: {number} checkpoints do not determine the law ({doubt})"
        amplitude, alpha, limit = self.interval.amplitude, self.interval.alpha, self.interval.limit
        return (
            f"{self.band}: alpha {self.fit.alpha:.3g} [{alpha[0]:.3g}, {alpha[1]:.3g}], "
            f"P* {100 * self.fit.limit:.1f} % [{100 * limit[0]:.1f}, {100 * limit[1]:.1f}], "
            f"A {100 * self.fit.amplitude:.3g} [{100 * amplitude[0]:.3g}, {100 * amplitude[1]:.3g}] points "
            f"at the largest compute, R2 {self.fit.r_squared:.3f} of {number} checkpoints, which leave "
            f"{number - 3} degrees of freedom"
        )

    def rivals_text(self) -> str | None:
        """Say which law describes the checkpoints best, and by how much. None if they are too few to tell."""
        criteria = compare_laws(self.compute, [rate.mean for rate in self.rates])
        if not all(map(math.isfinite, criteria.values())):
            return None
        best, *others = sorted(criteria.items(), key=lambda law: law[1])
        behind = ", ".join(f"{name} +{value - best[1]:.1f}" for name, value in others)
        return (
            f"{self.band}: the {best[0]} law describes the checkpoints best; Akaike's criterion of the "
            f"others: {behind} (below 2 is no difference)"
        )


def scaling(runs: list[Path], *, output: Path = Path("scaling.png")) -> None:
    """Fit P(C) = A / C^alpha + P* to each run's validated checkpoints and draw one panel for each run.

    Args:
        runs: Run folders (the value of trainer.default_root_dir), each with validations at four or more
            steps after its start.
        output: The PNG to write. The numbers are printed and also written beside it as Markdown.
    """
    read = read_runs([Path(run) for run in runs])
    curves = [scaling_curves(run) for run in read]
    output.parent.mkdir(parents=True, exist_ok=True)
    plot_scaling(read, curves, output)
    text = "\n\n".join(scaling_text(run, own) for run, own in zip(read, curves, strict=True)) + "\n"
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"{text}\n{output}")


def scaling_curves(run: Run) -> list[ScalingCurve]:
    """Build a curve for each band that has positions.

    Step 0 is left out, because the law is not defined at a compute of 0.

    Raises:
        ValueError: There are fewer than four validated steps, the steps do not say what they cost, or the
            validations have different positions or no reasoning.
    """
    validations = [results for step, results in run.validations.items() if step > 0]
    if len(validations) < MIN_POINTS:
        raise ValueError(
            f"{run.name}: only {len(validations)} of the steps after the start were validated, but the fit "
            f"needs {MIN_POINTS}. Keep checkpoints with --checkpoint.keep_every_n_steps and run "
            "`rpt validate ... --ckpt_path FILE` on each, or validate while training "
            "(trainer.val_check_interval)"
        )
    compute = [total(run, FLOPS, last_step=results.step) for results in validations]
    if None in compute:
        raise ValueError(
            f"{run.name}: its steps do not say what they cost ({FLOPS} in steps.jsonl). Was it trained by an "
            "earlier version?"
        )
    flops = [value for value in compute if value is not None]
    rows = [
        [other for _, other in pair_results(validations[0], results)] for results in validations
    ]  # [C][N], positions in one order
    curves = []
    for bands, inside in _bands(rows):
        curves.append(_curve(run.name, bands, [results.step for results in validations], flops, inside))
    if not curves:
        raise ValueError(
            f"{run.name}: no validated position has an entropy above {min(BANDS.values())}, so there is "
            "nothing to fit"
        )
    return curves


def _bands(
    rows: Sequence[Sequence[PositionResult]],
) -> list[tuple[list[str], list[Sequence[PositionResult]]]]:
    """Return the paper's difficulties with their positions at each checkpoint.

    Difficulties that hold the same positions are merged under all their names.
    """
    found: dict[
        int, tuple[list[str], list[Sequence[PositionResult]]]
    ] = {}  # keyed by number of positions, because a harder band is a part of an easier one
    for band, threshold in BANDS.items():
        inside: list[Sequence[PositionResult]] = [above(row, threshold) for row in rows]
        if inside[0]:
            found.setdefault(len(inside[0]), ([], inside))[0].append(band)
    return list(found.values())


def _curve(
    name: str,
    bands: Sequence[str],
    steps: Sequence[int],
    flops: Sequence[float],
    rows: Sequence[Sequence[PositionResult]],
) -> ScalingCurve:
    if any(p.reasoning_correct is None for row in rows for p in row):
        raise ValueError(
            f"{name}: a validation without reasoning accuracy cannot be on its scaling curve; validate with "
            "a config that has an engine"
        )
    correct = np.array([[bool(p.reasoning_correct) for p in row] for row in rows])  # [C, N]
    return ScalingCurve(
        band=", ".join(bands),
        threshold=BANDS[bands[0]],
        steps=tuple(steps),
        compute=tuple(flops),
        rates=tuple(Rate(int(row.sum()), len(row)) for row in correct),
        ntp_rates=tuple(Rate.of([p.ntp_correct for p in row]) for row in rows),
        fit=fit_scaling(flops, correct.mean(axis=1)),
        interval=bootstrap_scaling(flops, correct, [p.doc_id for p in rows[0]], num_resamples=_NUM_RESAMPLES),
    )


def scaling_text(run: Run, curves: Sequence[ScalingCurve]) -> str:
    """Write the points and the fits in Markdown."""
    rows = [
        markdown_row(f"{run.name}: step, FLOPs", [curve.band for curve in curves]),
        markdown_row("---", ["---"] * len(curves)),
    ]
    for index, (step, flops) in enumerate(zip(curves[0].steps, curves[0].compute, strict=True)):
        rows.append(markdown_row(f"{step}, {flops:.3g}: reasoning", [curve.rates[index] for curve in curves]))
        rows.append(
            markdown_row(f"{step}: NTP, same positions", [curve.ntp_rates[index] for curve in curves])
        )
    fits = [f"- {text}" for curve in curves for text in (curve.text(), curve.rivals_text()) if text]
    num_documents = curves[0].interval.num_units
    note = (
        "We fit P(C) = A / C^alpha + P* by least squares. The 95 % intervals come from "
        f"{_NUM_RESAMPLES} resamples of the {num_documents} documents."
    )
    return "\n".join([*rows, "", note, *fits])


def plot_scaling(runs: Sequence[Run], curves: Sequence[Sequence[ScalingCurve]], path: Path) -> None:
    """Write a PNG with one panel for each run.

    A panel shows the points by reasoning and by NTP with their intervals, the fitted law, and a band for
    the law's interval over documents.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(runs), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, run, own in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, curves, strict=True):
        _panel(panel, run.name, own)
    figure.savefig(path, dpi=120)


def _panel(panel: Axes, name: str, curves: Sequence[ScalingCurve]) -> None:
    for index, curve in enumerate(curves):
        colour = f"C{index}"
        for rates, fill in ((curve.rates, colour), (curve.ntp_rates, "none")):
            means = np.array([100 * rate.mean for rate in rates])
            ends = np.array([[100 * end for end in rate.interval] for rate in rates])  # [C, 2]
            panel.errorbar(
                curve.compute,
                means,
                yerr=np.abs(ends.T - means),
                fmt="o",
                color=colour,
                mfc=fill,
                capsize=2,
                lw=1,
            )
        compute, accuracy = curve.points()
        panel.plot(compute, 100 * np.array(accuracy), color=colour, label=curve.text())
        panel.fill_between(
            curve.compute,
            100 * curve.interval.curve_low,
            100 * curve.interval.curve_high,
            color=colour,
            alpha=0.15,
            lw=0,
        )
    panel.set_xscale("log")
    panel.set_xlabel("model FLOPs of training, rollouts included")
    panel.set_ylabel("held-out next-token accuracy, %\nby reasoning (full, with the law) and by NTP (hollow)")
    panel.set_title(name, fontsize=10)
    panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
