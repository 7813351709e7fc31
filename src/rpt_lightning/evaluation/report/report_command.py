"""`rpt report`: read runs, build the page and write it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rpt_lightning.evaluation.reasoning_patterns import pattern_shares
from rpt_lightning.evaluation.report.figures import all_figures
from rpt_lightning.evaluation.report.page import Page, RolloutBlock, render
from rpt_lightning.evaluation.report.rollout_data import compress_json, spread, step_data
from rpt_lightning.evaluation.report.tables import difficulty_table, field_tables, pattern_tables, run_table
from rpt_lightning.evaluation.report.verdict import verdicts
from rpt_lightning.evaluation.run_reader import Run, read_runs
from rpt_lightning.evaluation.tables.stages import Rate
from rpt_lightning.records.rollout_samples import read_samples

PatternsByStep = dict[int, dict[str, Rate]]


def report(runs: list[Path], *, output: Path = Path("report.html"), rollout_steps: int = 10) -> None:
    """Write one HTML file about one or more runs. It opens from disk, without a network connection.

    Args:
        runs: Run folders (the value of trainer.default_root_dir). The others are compared with the first.
        output: The file to write.
        rollout_steps: Number of steps of each run, evenly spaced, whose recorded rollouts the page keeps in
            full. At least 2.
    """
    if rollout_steps < 2:
        raise ValueError(
            f"rollout_steps={rollout_steps}: give 2 (the first and the last recorded step) or more"
        )
    read = read_runs([Path(run) for run in runs])
    patterns: dict[str, PatternsByStep] = {}
    blocks: list[RolloutBlock] = []
    for number, run in enumerate(read):
        patterns[run.name] = {}
        blocks += _rollouts(run, number, rollout_steps, patterns[run.name])
    page = Page(
        runs=read,
        verdicts=verdicts(read),
        difficulty_tables=[table for run in read if (table := difficulty_table(run))],
        field_tables=[table for run in read for table in field_tables(run)],
        run_table=run_table(read),
        pattern_tables=pattern_tables(patterns),
        figures=all_figures(read, patterns),
        rollouts=blocks,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(page), encoding="utf-8", newline="\n")
    print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB, {len(read)} {'run' if len(read) == 1 else 'runs'}. "
        "Open it in a browser."
    )


def _rollouts(run: Run, number: int, rollout_steps: int, patterns: PatternsByStep) -> Iterator[RolloutBlock]:
    """Yield the rollouts of the steps that the page holds, and fill ``patterns`` for all steps.

    Files are read one at a time, because all of them together may not fit into memory.
    """
    held = spread(list(run.rollouts), rollout_steps)
    for step, path in run.rollouts.items():
        samples = read_samples(path)
        patterns[step] = pattern_shares(
            (sample.completion for sample in samples), tasks=(sample.task_id for sample in samples)
        )
        if step in held:
            has_tokens = all(sample.tokens is not None for sample in samples)
            yield RolloutBlock(
                run=number,
                step=step,
                num_rollouts=len(samples),
                has_tokens=has_tokens,
                data=compress_json(step_data(samples)),
            )
