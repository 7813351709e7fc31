"""Summary of a run: one page and one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rpt_lightning.evaluation.run_log import RewardCurve, read_rewards
from rpt_lightning.evaluation.summary_figure import plot_summary
from rpt_lightning.evaluation.tables.stages import (
    INTERVAL_NOTE,
    Stage,
    comparison_lines,
    difficulty_table,
    stage_table,
)

_NUM_REWARD_STEPS = 10


def summarise(stages: Sequence[Stage], run_log: Path | None, output: Path) -> str:
    """Write ``summary.md`` and ``summary.png`` into the folder ``output`` and return the Markdown.

    ``stages`` are in the order of their training, and the last one is compared with the others. ``run_log``
    is the log of the RPT run.

    Raises:
        ValueError: The stages have different positions, or the run log has no rewards.
    """
    rewards = read_rewards(run_log) if run_log else None
    parts = [
        stage_table(stages),
        difficulty_table(stages),
        INTERVAL_NOTE,
        "\n".join([*comparison_lines(stages), *_reward_lines(rewards)]),
    ]
    markdown = "\n\n".join(parts) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.md").write_text(markdown, encoding="utf-8")
    plot_summary(stages, rewards, output / "summary.png")
    return markdown


def _reward_lines(rewards: RewardCurve | None) -> list[str]:
    if rewards is None:
        return []
    num_steps = min(_NUM_REWARD_STEPS, len(rewards.steps))
    return [
        f"- mean reward: {rewards.first(num_steps):.3f} in the first {num_steps} steps, "
        f"{rewards.last(num_steps):.3f} in the last {num_steps} of {len(rewards.steps)}"
    ]
