"""The report's figures, as Plotly specifications without colours of paper and text: the page adds those for light and dark.

Names of runs are escaped, since Plotly reads its texts as a subset of HTML. Each trace says in ``meta`` which run it belongs to.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rpt_lightning.evaluation.patterns import PATTERNS
from rpt_lightning.evaluation.report.accuracy import ALL, THRESHOLDS, AccuracyPoint, accuracy_point, accuracy_points
from rpt_lightning.evaluation.report.run import Run
from rpt_lightning.evaluation.table import Rate
from rpt_lightning.metrics.bands import BANDS

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's colours, which stay apart for colour-blind readers and on both backgrounds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
_PHASES = {"rollout": "time/rollout_s", "training": "time/train_s", "weights to engine": "time/sync_s"}
_SMOOTHING_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Figure:
    """``section`` is where it stands: accuracy, training, scaling or patterns."""

    section: str
    title: str
    note: str
    spec: dict[str, Any]


def colour(run: int) -> str:
    """The colour of a run on the whole page."""
    return COLOURS[run % len(COLOURS)]


def all_figures(runs: Sequence[Run], patterns: Mapping[str, Mapping[int, Mapping[str, Rate]]]) -> list[Figure]:
    """Those for which the runs hold data."""
    figures = [
        accuracy_bars(runs),
        _curve(runs, "Reward", "mean reward of a completion", "reward/mean"),
        heldout_curve(runs),
        _curve(runs, "Completion length", "tokens, mean of a step", "rollout/length_mean"),
        _curve(runs, "Entropy of the policy", "nats a token", "policy/entropy"),
        all_equal_curve(runs),
        logprob_difference(runs),
        *(time_by_phase(runs, number) for number in range(len(runs))),
        *(scaling(run) for run in runs),
        pattern_bars(runs, patterns),
        *(pattern_curve(name, shares) for name, shares in patterns.items()),
    ]
    return [figure for figure in figures if figure is not None]


def accuracy_bars(runs: Sequence[Run]) -> Figure | None:
    """Each run's last validation: a bar by reasoning and a hatched one by NTP, at the same positions."""
    import plotly.graph_objects as go

    validated = [(number, run.name, run.last_validation) for number, run in enumerate(runs) if run.last_validation]
    bands = [band for band in BANDS if any(accuracy_point(results, band).ntp.count for _, _, results in validated)]
    labels = []
    for band in bands:
        counts = sorted({accuracy_point(results, band).ntp.count for _, _, results in validated})
        labels.append(f"{band}<br>entropy > {BANDS[band]} nats, n = {' or '.join(f'{count:,}' for count in counts)}")
    traces = []
    for number, name, results in validated:
        points = [accuracy_point(results, band) for band in bands]
        for mode in ("reasoning", "NTP"):
            rates = [point.reasoning if mode == "reasoning" else point.ntp for point in points]
            if not any(rate.count for rate in rates):
                continue
            hatch = {"shape": "/", "fillmode": "overlay", "fgcolor": colour(number), "size": 6} if mode == "NTP" else {"shape": ""}
            traces.append(
                go.Bar(
                    x=labels,
                    name=f"{html.escape(name)}, {mode}",
                    marker={
                        "color": "rgba(0,0,0,0)" if mode == "NTP" else colour(number),
                        "pattern": hatch,
                        "line": {"color": colour(number), "width": 1.5},
                    },
                    **_percent(rates),
                    meta={"run": number},
                )
            )
    if not traces:
        return None
    figure = _figure(traces, "", "held-out next-token accuracy, %")
    figure.update_layout(barmode="group", bargap=0.25, bargroupgap=0.08, showlegend=True)
    figure.update_yaxes(rangemode="tozero")
    note = "Solid: by reasoning. Hatched: the same weights' next token without reasoning, at the same positions. Lines: 95 % intervals (Wilson). Bands are nested."
    return _done(figure, "accuracy", "Accuracy by difficulty, at each run's last validation", note)


def heldout_curve(runs: Sequence[Run]) -> Figure | None:
    """Accuracy over all held-out positions by step; NTP dashed."""
    traces = []
    for number, run in enumerate(runs):
        traces += _accuracy_traces(accuracy_points(run.validations, ALL), name=run.name, colour=colour(number), symbol=_symbol(number), run=number)
    if not traces:
        return None
    figure = _figure(traces, "optimizer step", "accuracy, %")
    return _done(figure, "training", "Held-out accuracy", "All positions. Line: by reasoning. Dashed: NTP. Bars: 95 % intervals.")


def scaling(run: Run) -> Figure | None:
    """Accuracy at every validated step for the three difficulties; points only, a fit is not drawn here."""
    traces: list[go.Scatter] = []
    for number, band in enumerate(BANDS):
        points = accuracy_points(run.validations, band)
        if len(points) >= 2:
            traces += _accuracy_traces(points, name=f"{band} (> {THRESHOLDS[band]} nats)", colour=colour(number), symbol=_symbol(number), run=None)
    if not traces:
        return None
    figure = _figure(traces, "optimizer step", "held-out accuracy, %")
    figure.update_layout(showlegend=True)
    return _done(figure, "scaling", f"{run.name}: accuracy by step and difficulty", "Line: by reasoning. Dashed: NTP. Bars: 95 % intervals.")


def all_equal_curve(runs: Sequence[Run]) -> Figure | None:
    """The share of groups that teach nothing, since all their rewards are equal."""
    traces = []
    for number, run in enumerate(runs):
        steps, live = run.series("rollout/live_groups_frac")
        traces += _smoothed(steps, [100 * (1 - share) for share in live], name=run.name, run=number)
    if not traces:
        return None
    figure = _figure(traces, "optimizer step", "all-equal groups, %")
    figure.update_yaxes(range=[0, 100])
    return _done(figure, "training", "Groups of equal rewards", "All completions of the group right, or all wrong: no gradient.")


def logprob_difference(runs: Sequence[Run]) -> Figure | None:
    """Engine against policy, on a logarithmic axis."""
    traces = []
    for number, run in enumerate(runs):
        for metric, dash in (("mean", "solid"), ("max", "dot")):
            steps, values = run.series(f"sync/logprob_diff_{metric}")
            if any(values):
                traces.append(_line(steps, values, name=f"{run.name}, {metric}", run=number, dash=dash))
    if not traces:
        return None
    figure = _figure(traces, "optimizer step", "nats a token")
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return _done(
        figure, "training", "Log-prob difference, engine and policy", "Line: mean over tokens. Dotted: largest. Steps of exactly 0 have no point."
    )


def time_by_phase(runs: Sequence[Run], number: int) -> Figure | None:
    """Where one run's steps spend their time, stacked."""
    import plotly.graph_objects as go

    run = runs[number]
    steps, totals = run.series("time/step_s")
    if not steps:
        return None
    rest = np.array(totals)
    traces = []
    for index, (name, metric) in enumerate(_PHASES.items()):
        values = np.array([run.steps[step].get(metric, 0.0) for step in steps])
        rest = rest - values
        traces.append((name, values, COLOURS[index]))
    traces.append(("other", np.maximum(rest, 0.0), "#888888"))
    figure = _figure(
        [
            go.Bar(x=steps, y=_rounded(values), name=name, marker={"color": shade, "line": {"width": 0}}, hovertemplate="%{y:.2f} s")
            for name, values, shade in traces
        ],
        "optimizer step",
        "seconds a step",
    )
    figure.update_layout(barmode="stack", bargap=0, showlegend=True)
    title = "Time by phase" if len(runs) == 1 else f"{run.name}: time by phase"
    return _done(figure, "training", title, "Stacked; the height is the whole step, without validation.")


def pattern_bars(runs: Sequence[Run], patterns: Mapping[str, Mapping[int, Mapping[str, Rate]]]) -> Figure | None:
    """Shares of completions at each run's last recorded step."""
    import plotly.graph_objects as go

    traces = []
    for number, run in enumerate(runs):
        if shares := patterns[run.name]:
            last = max(shares)
            bars = {
                "x": list(PATTERNS),
                "name": f"{html.escape(run.name)}, step {last}",
                "marker": {"color": colour(number)},
                "meta": {"run": number},
            }
            traces.append(go.Bar(**bars, **_percent([shares[last][pattern] for pattern in PATTERNS])))
    if not traces:
        return None
    figure = _figure(traces, "", "completions with a keyword, %")
    figure.update_layout(barmode="group", bargap=0.3, bargroupgap=0.08, showlegend=True)
    figure.update_yaxes(rangemode="tozero")
    return _done(figure, "patterns", "Reasoning patterns, at each run's last recorded step", "Lines: 95 % intervals (Wilson).")


def pattern_curve(run_name: str, shares: Mapping[int, Mapping[str, Rate]]) -> Figure | None:
    """Shares of completions by recorded step, a line a pattern."""
    if len(shares) < 2:
        return None
    traces = []
    for number, pattern in enumerate(PATTERNS):
        line = _line(list(shares), [0.0] * len(shares), name=pattern, run=None, shade=COLOURS[number], symbol=_SYMBOLS[number])
        traces.append(line.update(_percent([shares[step][pattern] for step in shares])))
        traces[-1].error_y = None  # six lines with intervals cannot be read; the table has them
    figure = _figure(traces, "optimizer step", "completions with a keyword, %")
    figure.update_layout(showlegend=True)
    figure.update_yaxes(rangemode="tozero")
    return _done(figure, "patterns", f"{run_name}: reasoning patterns by step", "Every recorded step.")


def _curve(runs: Sequence[Run], title: str, unit: str, metric: str) -> Figure | None:
    traces = [trace for number, run in enumerate(runs) for trace in _smoothed(*run.series(metric), name=run.name, run=number)]
    if not traces:
        return None
    note = f"Faint: each step. Strong: mean of {_SMOOTHING_STEPS} steps." if any(trace.opacity for trace in traces) else ""
    return _done(_figure(traces, "optimizer step", unit), "training", title, note)


def _accuracy_traces(points: Sequence[AccuracyPoint], *, name: str, colour: str, symbol: str, run: int | None) -> list[go.Scatter]:
    traces = []
    for mode, dash in (("reasoning", "solid"), ("NTP", "dash")):
        measured = [(p.step, p.reasoning if mode == "reasoning" else p.ntp) for p in points if (p.reasoning if mode == "reasoning" else p.ntp).count]
        if measured:
            steps = [step for step, _ in measured]
            line = _line(
                steps, [], name=f"{name}, {mode}", run=run, dash=dash, shade=colour, symbol=symbol if mode == "reasoning" else f"{symbol}-open"
            )
            traces.append(line.update(_percent([rate for _, rate in measured])))
    return traces


def _smoothed(steps: Sequence[int], values: Sequence[float], *, name: str, run: int) -> list[go.Scatter]:
    """Each step, and over it the mean of the last steps where there are enough to be worth it."""
    if len(steps) < 2 * _SMOOTHING_STEPS:
        return [_line(steps, values, name=name, run=run, symbol=_symbol(run))] if steps else []
    faint = _line(steps, values, name=name, run=run).update(opacity=0.3, hoverinfo="skip", hovertemplate=None)
    means = np.convolve(values, np.full(_SMOOTHING_STEPS, 1 / _SMOOTHING_STEPS), mode="valid")
    return [faint, _line(steps[_SMOOTHING_STEPS - 1 :], means, name=name, run=run)]


def _line(
    steps: Sequence[int], values: Any, *, name: str, run: int | None, dash: str = "solid", shade: str | None = None, symbol: str | None = None
) -> go.Scatter:
    import plotly.graph_objects as go

    return go.Scatter(
        x=list(steps),
        y=_rounded(values),
        name=html.escape(name),
        mode="lines+markers" if symbol else "lines",
        line={"color": shade or colour(run or 0), "dash": dash, "width": 2},
        marker={"size": 7, "symbol": symbol or "circle"},
        hovertemplate="%{y:.4~g}",
        meta={} if run is None else {"run": run},
    )


def _percent(rates: Sequence[Rate]) -> dict[str, Any]:
    """Heights, interval and hover text of a trace; a rate of nothing shows nothing."""
    means = [100 * rate.mean if rate.count else None for rate in rates]
    ends = [rate.interval if rate.count else (0.0, 0.0) for rate in rates]
    return {
        "y": [None if mean is None else round(mean, 3) for mean in means],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [round(100 * high - (mean or 0.0), 3) for (_, high), mean in zip(ends, means, strict=True)],
            "arrayminus": [round((mean or 0.0) - 100 * low, 3) for (low, _), mean in zip(ends, means, strict=True)],
            "thickness": 1.2,
            "width": 3,
        },
        "customdata": [str(rate) for rate in rates],
        "hovertemplate": "%{customdata}",
    }


def _symbol(number: int) -> str:
    return _SYMBOLS[number % len(_SYMBOLS)]


def _rounded(values: Any) -> list[float]:
    """Five digits are more than a picture shows, and lists (unlike arrays) stay readable in the file."""
    return [float(f"{value:.5g}") for value in values]


def _figure(traces: Sequence[Any], x_title: str, y_title: str) -> go.Figure:
    import plotly.graph_objects as go

    layout = {
        "xaxis": {"title": {"text": x_title}},
        "yaxis": {"title": {"text": y_title}},
        "showlegend": False,
        "hovermode": "x unified",
        "template": {},
    }
    return go.Figure(data=list(traces), layout=layout)


def _done(figure: go.Figure, section: str, title: str, note: str) -> Figure:
    return Figure(section=section, title=title, note=note, spec=figure.to_plotly_json())
