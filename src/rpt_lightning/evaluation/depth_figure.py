"""Figure that shows the benefit of thinking.

It plots accuracy by serial depth, and reward and completion length over the steps of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.evaluation.tables.stages import Rate
from rpt_lightning.records.results import PositionResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEPTH = "depth"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of the figure: its name, and whether the answer at each position was right."""

    name: str
    outcomes: Sequence[tuple[PositionResult, bool | None]]
    style: str = "o-"

    def by_depth(self) -> dict[float, Rate]:
        """Return the rate of right answers at each depth, in ascending order."""
        depths = sorted({_depth(position) for position, _ in self.outcomes})
        return {
            depth: Rate.of([right for position, right in self.outcomes if _depth(position) == depth])
            for depth in depths
        }


def reasoning(name: str, positions: Sequence[PositionResult], style: str = "o-") -> Curve:
    """Build the curve of answers after a thought."""
    return Curve(
        name=name, outcomes=[(position, position.reasoning_correct) for position in positions], style=style
    )


def without_reasoning(name: str, positions: Sequence[PositionResult], style: str = "o-") -> Curve:
    """Build the curve of standard next-token prediction."""
    return Curve(
        name=name, outcomes=[(position, position.ntp_correct) for position in positions], style=style
    )


def plot_depth(curves: Sequence[Curve], run: Run, path: Path, *, chance: float | None = None) -> None:
    """Write a PNG of accuracy by depth, and of reward and completion length at each step of ``run``.

    Accuracies have 95 % intervals. ``chance`` adds a line at the accuracy of guessing. Raises ValueError if
    a position has no depth.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _accuracy(left, curves, chance)
    _training(right, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _depth(position: PositionResult) -> float:
    depth = (position.fields or {}).get(DEPTH)
    if depth is None or isinstance(depth, str):
        raise ValueError(
            f"position {position.task_id}: its corpus gave it no {DEPTH!r}; prepare the folder from a source "
            "that marks answers"
        )
    return float(depth)


def _accuracy(panel: Axes, curves: Sequence[Curve], chance: float | None) -> None:
    for number, curve in enumerate(curves):
        rates = curve.by_depth()
        shift = 0.08 * (number - (len(curves) - 1) / 2)  # so that intervals do not hide each other
        means = [100 * rate.mean for rate in rates.values()]
        ends = [[100 * end for end in rate.interval] for rate in rates.values()]
        errors = [
            [mean - low for mean, (low, _) in zip(means, ends, strict=True)],
            [high - mean for mean, (_, high) in zip(means, ends, strict=True)],
        ]
        total = Rate.of([right for _, right in curve.outcomes])
        label = f"{curve.name}: {100 * total.mean:.1f} % of {total.count}"
        panel.errorbar(
            [depth + shift for depth in rates],
            means,
            yerr=errors,
            fmt=curve.style,
            capsize=2,
            markersize=4,
            linewidth=1.5,
            label=label,
        )
    if chance is not None:
        panel.axhline(
            100 * chance, color="0.6", linestyle=":", linewidth=1, label=f"guessing: {100 * chance:.1f} %"
        )
    panel.set_xlabel("serial depth: steps that have to be made one after the other")
    panel.set_ylabel("held-out accuracy, % (95 % intervals)")
    panel.set_ylim(-3, 103)
    panel.legend(
        fontsize=8, loc="center", bbox_to_anchor=(0.5, 0.62), frameon=False
    )  # between the curves that think and those that guess
    panel.set_title("Who can say what comes next", fontsize=10)


def _training(panel: Axes, run: Run) -> None:
    steps, rewards = run.series("reward/mean")
    panel.plot(steps, rewards, color="C0")
    panel.set_xlabel("step of RPT")
    panel.set_ylabel("mean reward", color="C0")
    panel.set_ylim(0, 1.03)
    lengths = panel.twinx()
    lengths.plot(*run.series("rollout/length_mean"), color="C3")
    lengths.set_ylabel("mean length of a completion (tokens)", color="C3")
    lengths.set_ylim(bottom=0)
    panel.set_title("It learns to think because thinking is rewarded", fontsize=10)
