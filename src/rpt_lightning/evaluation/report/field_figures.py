"""Figures of accuracy by a numeric field of the corpus, such as the serial depth of a position."""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.evaluation.report.plotly_parts import (
    Figure,
    colour,
    escape,
    finish,
    line,
    new_figure,
    percent,
    symbol_of,
)
from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.evaluation.tables.stages import Rate
from rpt_lightning.records.field_groups import MAX_VALUES, field_names, field_value, is_numeric, value_labels
from rpt_lightning.records.results import PositionResult


def field_curves(runs: Sequence[Run]) -> list[Figure]:
    """Draw one figure for each field with numeric values, at the last validation of each run."""
    positions = [
        position for run in runs if run.last_validation for position in run.last_validation.positions
    ]
    return [
        _field_curve(name, runs, positions) for name in field_names(positions) if is_numeric(positions, name)
    ]


def _field_curve(name: str, runs: Sequence[Run], positions: Sequence[PositionResult]) -> Figure:
    labels = value_labels(
        value for position in positions if (value := field_value(position, name)) is not None
    )
    has_ranges = len(labels) > MAX_VALUES
    # A value stands at its own place on the axis, but ranges stand side by side.
    places = {label: label if has_ranges else value for value, label in labels.items()}
    traces = []
    for number, run in enumerate(runs):
        groups: dict[str, list[PositionResult]] = {label: [] for label in places}
        for position in run.last_validation.positions if run.last_validation else ():
            if (value := field_value(position, name)) is not None:
                groups[labels[value]].append(position)
        for mode, dash in (("reasoning", "solid"), ("NTP", "dash")):
            outcomes = {
                label: [p.reasoning_correct if mode == "reasoning" else p.ntp_correct for p in members]
                for label, members in groups.items()
            }
            rates = {label: rate for label, of in outcomes.items() if (rate := Rate.of(of)).count}
            if rates:
                symbol = symbol_of(number) if mode == "reasoning" else f"{symbol_of(number)}-open"
                x = [places[label] for label in rates]
                trace = line(
                    x,
                    [],
                    name=f"{run.name}, {mode}",
                    run=number,
                    dash=dash,
                    shade=colour(number),
                    symbol=symbol,
                )
                traces.append(trace.update(percent(list(rates.values()))))
    figure = new_figure(traces, escape(name), "held-out next-token accuracy, %")
    figure.update_layout(showlegend=True)
    if has_ranges:
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(places))
    note = (
        "Line: by reasoning. Dashed: NTP of the same weights, at the same positions. "
        "Bars: 95 % intervals (Wilson)."
    )
    return finish(figure, "accuracy", f"Accuracy by {name}, at each run's last validation", note)
