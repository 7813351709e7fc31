"""The scaling curve of docs/evidence.md: accuracy against training FLOPs, with the paper's law.

The curve covers almost two decades of FLOPs in each seed. The starting model left the first phase of
configs/demo/start.yaml early, so it always thinks but gets some of its moves wrong. RPT then corrects its
thoughts move by move. This takes far longer than discovering that thinking helps.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evidence_records import QUESTIONS, marks, replace_text

from rpt_lightning.evaluation.run_cost import FLOPS, total
from rpt_lightning.evaluation.run_reader import Run, read_run
from rpt_lightning.evaluation.scaling.law import (
    ScalingFit,
    ScalingInterval,
    bootstrap_scaling,
    compare_laws,
    fit_scaling,
)
from rpt_lightning.evaluation.tables.stages import Rate, markdown_row, markdown_table

START_STEPS = 160  # of the first phase
# Validations are frequent at first and then rare, because a power law needs points at logarithmic steps.
FIRST_STEPS, FIRST_EVERY = 16, 2
LAST_STEP, EVERY = 200, 8
RPT_SETTINGS: dict[str, object] = {
    "--model.optimizer.lr": 1e-4,
    "--model.lr_scheduler": "null",
    "--data.tasks_per_step": 32,
    "--rollout.evaluation.thought_controls": False,
}
CHANCE = 1 / 8


@dataclass(frozen=True, kw_only=True)
class CurveRecord:
    """One seed's run: its validated checkpoints, their compute, and the outcome at each held-out position.

    ``reasoning`` and ``ntp`` hold one string per checkpoint, with a 1 or a 0 for each held-out position.
    """

    steps: tuple[int, ...]
    flops: tuple[float, ...]
    reasoning: tuple[str, ...]
    ntp: tuple[str, ...]
    about: dict[str, Any]

    def rates(self, question: str) -> list[Rate]:
        return [Rate(outcomes.count("1"), len(outcomes)) for outcomes in getattr(self, question)]


def measure_curve(run: Path, *, about: dict[str, Any]) -> CurveRecord:
    """Collect every validation of a run except the one before its first step."""
    read: Run = read_run(run)
    steps, flops, reasoning, ntp = [], [], [], []
    for step, results in sorted(read.validations.items()):
        cost = total(read, FLOPS, last_step=step) if step else None
        if cost is None:
            continue
        positions = sorted(results.positions, key=lambda position: position.task_id)
        steps.append(step)
        flops.append(cost)
        reasoned, predicted = (marks(positions, QUESTIONS[question]) for question in ("reasoning", "ntp"))
        if reasoned is None or predicted is None:
            raise ValueError(f"{run}: the validation at step {step} did not measure every position")
        reasoning.append(reasoned)
        ntp.append(predicted)
    return CurveRecord(
        steps=tuple(steps), flops=tuple(flops), reasoning=tuple(reasoning), ntp=tuple(ntp), about=about
    )


def write_curve(path: Path, record: CurveRecord) -> None:
    replace_text(path, json.dumps(asdict(record)) + "\n")


def read_curves(folder: Path) -> dict[int, CurveRecord]:
    """Read the records of all seeds, keyed by seed."""
    curves = {}
    for path in sorted(folder.glob("scaling-*.json")):
        kept = json.loads(path.read_text())
        curves[int(path.stem.removeprefix("scaling-"))] = CurveRecord(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
        )
    return curves


def law_table(curves: dict[int, CurveRecord]) -> str:
    """Tabulate the paper's law for each seed, and the law that fits its checkpoints best."""
    rows = [markdown_row(f"seed {seed}", _law_cells(curve)) for seed, curve in curves.items()]
    columns = [
        "checkpoints",
        "FLOPs",
        "accuracy, first to last",
        "next token at once, last",
        "A (points)",
        "alpha",
        "P*",
        "R2",
        "law that fits best",
    ]
    return markdown_table("P(C) = A / C^alpha + P*", columns, rows)


def _law(curve: CurveRecord) -> tuple[ScalingFit, ScalingInterval]:
    """Fit the paper's law, with intervals over documents. A game has one held-out position."""
    correct = np.array([[mark == "1" for mark in outcomes] for outcomes in curve.reasoning])
    documents = [str(number) for number in range(correct.shape[1])]
    return fit_scaling(curve.flops, correct.mean(axis=1)), bootstrap_scaling(curve.flops, correct, documents)


def _law_cells(curve: CurveRecord) -> list[object]:
    fit, interval = _law(curve)
    doubt = fit.doubt or interval.doubt
    reasoning, ntp = curve.rates("reasoning"), curve.rates("ntp")
    cells: list[object] = [
        len(curve.steps),
        f"{curve.flops[0]:.2g} to {curve.flops[-1]:.2g}",
        f"{reasoning[0]} to {reasoning[-1]}",
        ntp[-1],
    ]
    if doubt:
        cells += [f"not determined: {doubt}", "-", "-", "-"]
    else:
        cells += [
            f"{100 * fit.amplitude:.2f} "
            f"[{100 * interval.amplitude[0]:.2f}, {100 * interval.amplitude[1]:.2f}]",
            f"{fit.alpha:.2f} [{interval.alpha[0]:.2f}, {interval.alpha[1]:.2f}]",
            f"{100 * fit.limit:.1f} % [{100 * interval.limit[0]:.1f}, {100 * interval.limit[1]:.1f}]",
            f"{fit.r_squared:.3f}",
        ]
    criteria = compare_laws(curve.flops, [rate.mean for rate in reasoning])
    best, *others = sorted(criteria.items(), key=lambda law: law[1])
    return [*cells, f"{best[0]} ({', '.join(f'{name} +{value - best[1]:.1f}' for name, value in others)})"]


def plot_laws(curves: dict[int, CurveRecord], path: Path) -> None:
    """Plot one panel per seed: accuracy with Wilson's intervals, the law, and a band around the law.

    The band is the law's bootstrap interval over documents.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(curves), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (seed, curve) in zip(
        figure.subplots(1, len(curves), squeeze=False, sharey=True)[0], curves.items(), strict=True
    ):
        fit, interval = _law(curve)
        for question, style in (("reasoning", "o"), ("ntp", "^")):
            rates = curve.rates(question)
            means = np.array([100 * rate.mean for rate in rates])
            ends = np.array([[100 * end for end in rate.interval] for rate in rates])
            panel.errorbar(
                curve.flops,
                means,
                yerr=np.abs(ends.T - means),
                fmt=style,
                markersize=3,
                capsize=1.5,
                linewidth=0.8,
                label=question,
            )
        dense = np.geomspace(curve.flops[0], curve.flops[-1], 80)
        panel.plot(dense, 100 * fit.predict(dense), color="C0", linewidth=1.2, label="law")
        panel.fill_between(
            curve.flops,
            100 * interval.curve_low,
            100 * interval.curve_high,
            color="C0",
            alpha=0.15,
            linewidth=0,
        )
        panel.axhline(100 * CHANCE, color="0.6", linestyle=":", linewidth=1)
        panel.set_xscale("log")
        panel.set_title(f"seed {seed}", fontsize=10)
        panel.set_xlabel("FLOPs of training, rollouts included")
        panel.set_ylim(0, 103)
    figure.axes[0].set_ylabel("held-out accuracy, % (95 % intervals)")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
