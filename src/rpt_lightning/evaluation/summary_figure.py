"""Figure of a run: each stage's accuracy by difficulty, beside NTP, and the reward over training steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rpt_lightning.evaluation.run_log import RewardCurve
from rpt_lightning.evaluation.tables.stages import Rate, Stage, above
from rpt_lightning.metrics.difficulty_bands import BANDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMOOTHING_STEPS = 10


def plot_summary(stages: Sequence[Stage], rewards: RewardCurve | None, path: Path) -> None:
    """Write a PNG with a panel of bars and, if there is a reward curve, a second panel for it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A separate Figure, unlike pyplot, needs no global state and no display.
    figure = Figure(figsize=(14 if rewards else 8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if rewards else 1, squeeze=False)[0]
    _accuracy_bars(panels[0], stages)
    if rewards:
        _reward_curve(panels[1], rewards)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _accuracy_bars(panel: Axes, stages: Sequence[Stage]) -> None:
    bands = [
        name
        for name, threshold in BANDS.items()
        if any(above(stage.results.positions, threshold) for stage in stages)
    ]
    width = 0.8 / (2 * len(stages))
    colours = [f"C{index}" for index in range(len(stages))]
    for index, stage in enumerate(stages):
        for is_ntp in (False, True):
            rates = []
            for band in bands:
                positions = above(stage.results.positions, BANDS[band])
                rates.append(Rate.of([p.ntp_correct if is_ntp else p.reasoning_correct for p in positions]))
            centres = np.arange(len(bands)) - 0.4 + width * (2 * index + is_ntp + 0.5)
            means, errors = _percent(rates)
            label = f"{stage.name}, {'NTP' if is_ntp else 'reasoning'}"
            style: dict[str, Any] = (
                {"facecolor": "none", "hatch": "///"} if is_ntp else {"facecolor": colours[index]}
            )
            panel.bar(
                centres,
                means,
                width * 0.92,
                yerr=errors,
                capsize=2,
                label=label,
                edgecolor=colours[index],
                error_kw={"lw": 1},
                **style,
            )
    counts = [len(above(stages[-1].results.positions, BANDS[band])) for band in bands]
    panel.set_xticks(
        range(len(bands)),
        [f"{band}\nentropy > {BANDS[band]}, n = {count}" for band, count in zip(bands, counts, strict=True)],
    )
    panel.set_ylabel("held-out next-token accuracy, %")
    panel.set_title(
        "Accuracy with 95 % intervals, with and without reasoning at the same positions", fontsize=10
    )
    panel.set_ylim(bottom=0)
    panel.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(stages), frameon=False
    )


def _percent(rates: Sequence[Rate]) -> tuple[np.ndarray, np.ndarray]:
    """Return means [bands] and distances to the interval's ends [2, bands], in percent.

    A stage without positions in a band shows nothing there.
    """
    means = np.array([100 * rate.mean if rate.count else np.nan for rate in rates])
    ends = np.array(
        [[100 * end for end in rate.interval] if rate.count else [np.nan, np.nan] for rate in rates]
    )  # [bands, 2]
    return means, np.abs(ends.T - means)


def _reward_curve(panel: Axes, rewards: RewardCurve) -> None:
    panel.plot(rewards.steps, rewards.means, ".", alpha=0.4, label="each step")
    window = min(_SMOOTHING_STEPS, len(rewards.means))
    smooth = np.convolve(rewards.means, np.full(window, 1 / window), mode="valid")
    panel.plot(rewards.steps[window - 1 :], smooth, label=f"mean of the last {window} steps")
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("mean reward")
    panel.set_title("Reward while training", fontsize=10)
    panel.legend(fontsize=8)
