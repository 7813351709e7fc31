"""Shared parts of the report's figures: colours, traces and an empty frame, as Plotly specifications.

The page adds the colours of paper and text for its light and dark themes. Names are escaped, because Plotly
reads its texts as a subset of HTML. A trace that belongs to one run gives the run's number in ``meta``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rpt_lightning.evaluation.tables.stages import Rate

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's colours can be told apart by colour-blind readers and on both backgrounds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
SMOOTHING_STEPS = 10
_MAX_OWN_TICKS = 6


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the report. ``section`` is its place: accuracy, training, scaling or patterns."""

    section: str
    title: str
    note: str
    spec: dict[str, Any]


def colour(run: int) -> str:
    """Return the colour of a run on the whole page."""
    return COLOURS[run % len(COLOURS)]


def escape(name: str) -> str:
    """Escape a name so that Plotly shows it unchanged."""
    return html.escape(name, quote=False)


def symbol_of(number: int) -> str:
    """Return the marker of a run or band, for readers who cannot see the colour."""
    return SYMBOLS[number % len(SYMBOLS)]


def new_figure(traces: Sequence[Any], x_title: str, y_title: str) -> go.Figure:
    """Build a figure without a legend.

    Most figures show runs, and the page has one legend for all of them.
    """
    import plotly.graph_objects as go

    steps = sorted({step for trace in traces for step in trace.x if isinstance(step, int)})
    # With few steps, Plotly would put ticks between them.
    ticks = {"tickvals": steps} if 0 < len(steps) <= _MAX_OWN_TICKS else {}
    layout = {
        "xaxis": {"title": {"text": x_title}, **ticks},
        "yaxis": {"title": {"text": y_title}, "rangemode": "nonnegative"},  # no plotted value is negative
        "showlegend": False,
        "hovermode": "x unified",
        "template": {},
    }
    return go.Figure(data=list(traces), layout=layout)


def finish(figure: go.Figure, section: str, title: str, note: str) -> Figure:
    """Wrap a figure in the record that the page takes."""
    return Figure(section=section, title=title, note=note, spec=figure.to_plotly_json())


def line(
    steps: Sequence[float | str],
    values: Any,
    *,
    name: str,
    run: int | None,
    dash: str = "solid",
    shade: str | None = None,
    symbol: str | None = None,
) -> go.Scatter:
    """Draw one series over optimizer steps, FLOPs or a field's values.

    It has the colour of its run, or ``shade``.
    """
    import plotly.graph_objects as go

    return go.Scatter(
        x=list(steps),
        y=rounded(values),
        name=escape(name),
        mode="lines+markers" if symbol else "lines",
        line={"color": shade or colour(run or 0), "dash": dash, "width": 2},
        marker={"size": 7, "symbol": symbol or "circle"},
        hovertemplate="%{y:.4~g}",
        meta={} if run is None else {"run": run},
    )


def smoothed(steps: Sequence[int], values: Sequence[float], *, name: str, run: int) -> list[go.Scatter]:
    """Draw each step and, if there are enough steps, the mean of the last steps over them."""
    if len(steps) < 2 * SMOOTHING_STEPS:
        return [line(steps, values, name=name, run=run, symbol=symbol_of(run))] if steps else []
    faint = line(steps, values, name=name, run=run).update(opacity=0.3, hoverinfo="skip", hovertemplate=None)
    means = np.convolve(values, np.full(SMOOTHING_STEPS, 1 / SMOOTHING_STEPS), mode="valid")
    return [faint, line(steps[SMOOTHING_STEPS - 1 :], means, name=name, run=run)]


def percent(rates: Sequence[Rate]) -> dict[str, Any]:
    """Return heights, intervals and hover texts of a trace. A rate with count 0 shows nothing."""
    means = [100 * rate.mean if rate.count else None for rate in rates]
    ends = [rate.interval if rate.count else (0.0, 0.0) for rate in rates]
    return {
        "y": [None if mean is None else round(mean, 3) for mean in means],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [
                round(100 * high - (mean or 0.0), 3) for (_, high), mean in zip(ends, means, strict=True)
            ],
            "arrayminus": [
                round((mean or 0.0) - 100 * low, 3) for (low, _), mean in zip(ends, means, strict=True)
            ],
            "thickness": 1.2,
            "width": 3,
        },
        "customdata": [str(rate) for rate in rates],
        "hovertemplate": "%{customdata}",
    }


def rounded(values: Any) -> list[float | None]:
    """Round values to five digits, which is more than a figure shows.

    Lists (unlike arrays) stay readable in the file. JSON has no NaN, so a value that is not finite has no
    point.
    """
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
