"""Figures of the report. Each function takes runs and returns nothing if they hold no data for its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rpt_lightning.evaluation.reasoning_patterns import PATTERNS
from rpt_lightning.evaluation.report.accuracy import (
    ALL,
    THRESHOLDS,
    AccuracyPoint,
    accuracy_point,
    accuracy_points,
)
from rpt_lightning.evaluation.report.field_figures import field_curves
from rpt_lightning.evaluation.report.plotly_parts import (
    COLOURS,
    SMOOTHING_STEPS,
    SYMBOLS,
    Figure,
    colour,
    escape,
    finish,
    line,
    new_figure,
    percent,
    rounded,
    smoothed,
    symbol_of,
)
from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.evaluation.scaling.figure import ScalingCurve, scaling_curves
from rpt_lightning.evaluation.tables.stages import Rate
from rpt_lightning.metrics.difficulty_bands import BANDS

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PHASES = {"rollout": "time/rollout_s", "training": "time/train_s", "weights to engine": "time/sync_s"}


def all_figures(
    runs: Sequence[Run], patterns: Mapping[str, Mapping[int, Mapping[str, Rate]]]
) -> list[Figure]:
    """Draw the figures for which the runs hold data."""
    figures = [
        accuracy_bars(runs),
        *field_curves(runs),
        _curve(runs, "Reward", "mean reward of a completion", "reward/mean"),
        heldout_curve(runs),
        _curve(runs, "Completion length", "tokens, mean of a step", "rollout/length_mean"),
        _curve(runs, "Entropy of the policy", "nats per token", "policy/entropy"),
        all_equal_curve(runs),
        logprob_difference(runs),
        *(time_by_phase(runs, number) for number in range(len(runs))),
        *(scaling(run) for run in runs),
        pattern_bars(runs, patterns),
        *(pattern_curve(name, shares) for name, shares in patterns.items()),
    ]
    return [figure for figure in figures if figure is not None]


def accuracy_bars(runs: Sequence[Run]) -> Figure | None:
    """Draw each run's last validation as a solid bar (reasoning) and a hatched bar (NTP, same positions)."""
    import plotly.graph_objects as go

    validated = [
        (number, run.name, run.last_validation) for number, run in enumerate(runs) if run.last_validation
    ]
    bands = [
        band for band in BANDS if any(accuracy_point(results, band).ntp.count for _, _, results in validated)
    ]
    labels = []
    for band in bands:
        counts = sorted({accuracy_point(results, band).ntp.count for _, _, results in validated})
        labels.append(
            f"{band}<br>&gt; {BANDS[band]} nats<br>n = {' or '.join(f'{count:,}' for count in counts)}"
        )
    traces = []
    for number, name, results in validated:
        points = [accuracy_point(results, band) for band in bands]
        for mode in ("reasoning", "NTP"):
            rates = [point.reasoning if mode == "reasoning" else point.ntp for point in points]
            if not any(rate.count for rate in rates):
                continue
            hatch = (
                {"shape": "/", "fillmode": "overlay", "fgcolor": colour(number), "size": 6}
                if mode == "NTP"
                else {"shape": ""}
            )
            traces.append(
                go.Bar(
                    x=labels,
                    name=f"{escape(name)}, {mode}",
                    marker={
                        "color": "rgba(0,0,0,0)" if mode == "NTP" else colour(number),
                        "pattern": hatch,
                        "line": {"color": colour(number), "width": 1.5},
                    },
                    **percent(rates),
                    meta={"run": number},
                )
            )
    if not traces:
        return None
    figure = new_figure(traces, "", "held-out next-token accuracy, %")
    figure.update_layout(barmode="group", bargap=0.25, bargroupgap=0.08, showlegend=True, xaxis_tickangle=0)
    figure.update_yaxes(rangemode="tozero")
    note = (
        "Solid: by reasoning. Hatched: NTP of the same weights, at the same positions. "
        "Lines: 95 % intervals (Wilson). Bands, by the proxy's entropy, are nested."
    )
    return finish(figure, "accuracy", "Accuracy by difficulty, at each run's last validation", note)


def heldout_curve(runs: Sequence[Run]) -> Figure | None:
    """Draw the accuracy over all held-out positions by step, with NTP as a dashed line."""
    traces = []
    for number, run in enumerate(runs):
        traces += _accuracy_traces(
            accuracy_points(run.validations, ALL),
            name=run.name,
            colour=colour(number),
            symbol=symbol_of(number),
            run=number,
        )
    if not traces:
        return None
    figure = new_figure(traces, "optimizer step", "accuracy, %")
    return finish(
        figure,
        "training",
        "Held-out accuracy",
        "All positions. Line: by reasoning. Dashed: NTP. Bars: 95 % intervals.",
    )


def scaling(run: Run) -> Figure | None:
    """Draw the accuracy at every validated step for the three difficulties.

    The figure shows accuracy against FLOPs with the fitted law. If a fit is not possible, it shows accuracy
    by step and gives the reason.
    """
    try:
        return _fitted_scaling(run, scaling_curves(run))
    except ValueError as error:
        reason = str(error)
    traces: list[go.Scatter] = []
    for number, band in enumerate(BANDS):
        points = accuracy_points(run.validations, band)
        if len(points) >= 2:
            traces += _accuracy_traces(
                points,
                name=f"{band} (> {THRESHOLDS[band]} nats)",
                colour=colour(number),
                symbol=symbol_of(number),
                run=None,
            )
    if not traces:
        return None
    figure = new_figure(traces, "optimizer step", "held-out accuracy, %")
    figure.update_layout(showlegend=True)
    note = f"Line: by reasoning. Dashed: NTP. Bars: 95 % intervals. No law is fitted. {reason}"
    return finish(figure, "scaling", f"{run.name}: accuracy by step and difficulty", note)


def _fitted_scaling(run: Run, curves: Sequence[ScalingCurve]) -> Figure:
    traces: list[go.Scatter] = []
    for number, curve in enumerate(curves):
        style: dict[str, Any] = {"run": None, "shade": colour(number)}
        law, accuracy = curve.points()
        traces.append(
            line(law, [100 * value for value in accuracy], name=f"{curve.band}, law", **style).update(
                hoverinfo="skip", hovertemplate=None
            )
        )
        points = line(
            curve.compute,
            [],
            name=f"{curve.band} (> {curve.threshold} nats)",
            symbol=symbol_of(number),
            **style,
        )
        traces.append(points.update(mode="markers").update(percent(curve.rates)))
        without = line(
            curve.compute,
            [],
            name=f"{curve.band}, NTP",
            symbol=f"{symbol_of(number)}-open",
            dash="dash",
            **style,
        )
        traces.append(without.update(percent(curve.ntp_rates)))
    figure = new_figure(traces, "model FLOPs of training, rollouts included", "held-out accuracy, %")
    figure.update_layout(showlegend=True)
    figure.update_xaxes(type="log", exponentformat="power")
    fits = ". ".join(curve.text() for curve in curves)
    note = (
        "Full: by reasoning. Hollow, dashed: NTP of the same weights. "
        "Line: P(C) = A / C^alpha + P*. Brackets: 95 % intervals over documents. "
        f"{fits}. Bars: 95 % intervals (Wilson)."
    )
    return finish(figure, "scaling", f"{run.name}: accuracy against training compute", note)


def all_equal_curve(runs: Sequence[Run]) -> Figure | None:
    """Draw the share of zero-variance groups. Their rewards are all equal, so they teach nothing."""
    traces = []
    for number, run in enumerate(runs):
        steps, live = run.series("rollout/live_groups_frac")
        traces += smoothed(steps, [100 * (1 - share) for share in live], name=run.name, run=number)
    if not traces:
        return None
    figure = new_figure(traces, "optimizer step", "all-equal groups, %")
    figure.update_yaxes(range=[0, 100])
    return finish(
        figure,
        "training",
        "Groups of equal rewards",
        "All completions of the group are right, or all are wrong: no gradient.",
    )


def logprob_difference(runs: Sequence[Run]) -> Figure | None:
    """Draw the log-prob difference between engine and policy on a logarithmic axis."""
    traces = []
    for number, run in enumerate(runs):
        for metric, dash in (("mean", "solid"), ("max", "dot")):
            steps, values = run.series(f"sync/logprob_diff_{metric}")
            if any(values):
                traces.append(line(steps, values, name=f"{run.name}, {metric}", run=number, dash=dash))
    if not traces:
        return None
    figure = new_figure(traces, "optimizer step", "nats per token")
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return finish(
        figure,
        "training",
        "Log-prob difference, engine and policy",
        "Line: mean over tokens. Dotted: largest. Steps with exactly 0 have no point.",
    )


def time_by_phase(runs: Sequence[Run], number: int) -> Figure | None:
    """Draw the time of one run's steps, stacked by phase."""
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
    figure = new_figure(
        [
            go.Bar(
                x=steps,
                y=rounded(values),
                name=name,
                marker={"color": shade, "line": {"width": 0}},
                hovertemplate="%{y:.2f} s",
            )
            for name, values, shade in traces
        ],
        "optimizer step",
        "seconds per step",
    )
    figure.update_layout(barmode="stack", bargap=0, showlegend=True)
    title = "Time by phase" if len(runs) == 1 else f"{run.name}: time by phase"
    return finish(figure, "training", title, "Stacked. The height is the whole step, without validation.")


def pattern_bars(
    runs: Sequence[Run], patterns: Mapping[str, Mapping[int, Mapping[str, Rate]]]
) -> Figure | None:
    """Draw the shares of completions that show each pattern, at each run's last recorded step."""
    import plotly.graph_objects as go

    traces = []
    for number, run in enumerate(runs):
        if shares := patterns[run.name]:
            last = max(shares)
            bars = {
                "x": list(PATTERNS),
                "name": f"{escape(run.name)}, step {last}",
                "marker": {"color": colour(number)},
                "meta": {"run": number},
            }
            traces.append(go.Bar(**bars, **percent([shares[last][pattern] for pattern in PATTERNS])))
    if not traces:
        return None
    figure = new_figure(traces, "", "completions with a keyword, %")
    figure.update_layout(barmode="group", bargap=0.3, bargroupgap=0.08, showlegend=True)
    figure.update_yaxes(rangemode="tozero")
    return finish(
        figure,
        "patterns",
        "Reasoning patterns, at each run's last recorded step",
        "Lines: 95 % intervals (Wilson, the completions of a task as one cluster).",
    )


def pattern_curve(run_name: str, shares: Mapping[int, Mapping[str, Rate]]) -> Figure | None:
    """Draw the shares of completions by recorded step, with one line for each pattern."""
    if len(shares) < 2:
        return None
    traces = []
    for number, pattern in enumerate(PATTERNS):
        trace = line(list(shares), [], name=pattern, run=None, shade=COLOURS[number], symbol=SYMBOLS[number])
        # Intervals are left out, because six lines with intervals cannot be read. The table has them.
        traces.append(trace.update(percent([shares[step][pattern] for step in shares]) | {"error_y": None}))
    figure = new_figure(traces, "optimizer step", "completions with a keyword, %")
    figure.update_layout(showlegend=True)
    figure.update_yaxes(rangemode="tozero")
    return finish(figure, "patterns", f"{run_name}: reasoning patterns by step", "Every recorded step.")


def _curve(runs: Sequence[Run], title: str, unit: str, metric: str) -> Figure | None:
    traces = [
        trace
        for number, run in enumerate(runs)
        for trace in smoothed(*run.series(metric), name=run.name, run=number)
    ]
    if not traces:
        return None
    note = (
        f"Faint: each step. Strong: mean of {SMOOTHING_STEPS} steps."
        if any(trace.opacity for trace in traces)
        else ""
    )
    return finish(new_figure(traces, "optimizer step", unit), "training", title, note)


def _accuracy_traces(
    points: Sequence[AccuracyPoint], *, name: str, colour: str, symbol: str, run: int | None
) -> list[go.Scatter]:
    traces = []
    for mode, rates, dash, marker in (
        ("reasoning", {point.step: point.reasoning for point in points}, "solid", symbol),
        ("NTP", {point.step: point.ntp for point in points}, "dash", f"{symbol}-open"),
    ):
        measured = {step: rate for step, rate in rates.items() if rate.count}
        if measured:
            trace = line(
                list(measured), [], name=f"{name}, {mode}", run=run, dash=dash, shade=colour, symbol=marker
            )
            traces.append(trace.update(percent(list(measured.values()))))
    return traces
