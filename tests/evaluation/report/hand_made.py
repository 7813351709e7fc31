"""Shared data of the tests of the report's parts: four positions, and invented runs and pattern shares."""

from __future__ import annotations

from dataclasses import replace

from rpt_lightning.evaluation.reasoning_patterns import PATTERNS
from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.evaluation.tables.stages import Rate
from sample_results import FIRST, results


def position(name, entropy, reasoning, ntp, **fields):
    return replace(
        FIRST,
        task_id=name,
        doc_id=name[0],
        entropy=entropy,
        reasoning_correct=reasoning,
        ntp_correct=ntp,
        **fields,
    )


POLICY = results(
    position("a1", 0.6, True, True), position("a2", 1.2, True, False, answerable=False),
    position("b1", 1.6, False, True), position("b2", 2.0, None, True)
)  # fmt: skip


def run(name, *, steps=None, validations=()):
    return Run(name=name, steps=steps or {}, validations={one.step: one for one in validations}, rollouts={})


def shares(hypothesis):
    """Make shares in which the given number of 100 completions show a hypothesis, and none anything else."""
    return {name: Rate(hypothesis if name == "hypothesis" else 0, 100) for name in PATTERNS}
