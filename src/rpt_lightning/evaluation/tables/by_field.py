"""Markdown tables of accuracy by what the corpus knows about a position, such as its serial depth.

There is one table for each field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rpt_lightning.evaluation.tables.stages import Stage, accuracy_rows, markdown_table
from rpt_lightning.records.field_groups import field_names, field_value, value_labels
from rpt_lightning.records.results import PositionResult


def field_tables(stages: Sequence[Stage]) -> list[str]:
    """Build a table for each field that any position has.

    Its rows are the field's values, or ranges of them (records/field_groups.py). Positions without the
    field are left out. A field belongs to a position, whichever policy answers there. Results of an earlier
    version have no fields and therefore take those of the other stages.
    """
    columns = _with_fields(stages)
    names = field_names(position for positions in columns for position in positions)
    return [_field_table(name, [stage.name for stage in stages], columns) for name in names]


def _field_table(name: str, stage_names: Sequence[str], columns: Sequence[Sequence[PositionResult]]) -> str:
    values = [[field_value(position, name) for position in positions] for positions in columns]
    labels = value_labels(value for column in values for value in column if value is not None)
    rows = []
    for label in dict.fromkeys(labels.values()):
        selections = [
            [
                position
                for position, value in zip(positions, column, strict=True)
                if value is not None and labels[value] == label
            ]
            for positions, column in zip(columns, values, strict=True)
        ]
        rows += accuracy_rows(_cell(label), _cell(name), selections)
    return markdown_table(f"by {_cell(name)}", stage_names, rows)


def _with_fields(stages: Sequence[Stage]) -> list[list[PositionResult]]:
    known = {
        position.task_id: position.fields
        for stage in stages
        for position in stage.results.positions
        if position.fields
    }
    return [
        [
            position if position.fields else replace(position, fields=known.get(position.task_id))
            for position in stage.results.positions
        ]
        for stage in stages
    ]


def _cell(text: str) -> str:
    """Format text for a cell of a Markdown table: on one line, with every bar escaped."""
    return " ".join(text.split()).replace("|", "\\|") or "(empty)"
