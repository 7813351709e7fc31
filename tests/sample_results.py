"""Two positions that the tests of results vary."""

from __future__ import annotations

from dataclasses import replace

from rpt_lightning.records.results import PositionResult, Results

FIRST = PositionResult(
    task_id="a:3",
    doc_id="a",
    position=3,
    entropy=1.25,
    answerable=True,
    truth=" 4\u2028",  # a line separator that JSON does not escape
    prediction=None,
    reasoning_correct=False,
    ntp_correct=True,
    ntp_logprob=-0.5,
    boxed=False,
    truncated=True,
    length=16,
)
SECOND = replace(
    FIRST,
    task_id="b:9",
    doc_id="b",
    position=9,
    prediction="é",
    reasoning_correct=True,
    empty_thought_correct=False,
)


def results(*positions: PositionResult) -> Results:
    return Results(positions=positions, policy_path="models/p", step=7)
