"""`rpt compare`: set runs side by side at the same held-out positions and the same questions.

The cost of each run up to its validated step is shown as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rpt_lightning.evaluation.paired_bootstrap import compare_policies, paired_bootstrap
from rpt_lightning.evaluation.run_cost import FLOPS, SECONDS, TOKENS, total
from rpt_lightning.evaluation.run_reader import Run, read_runs
from rpt_lightning.evaluation.tables.answers import (
    NOTE,
    AnswerStage,
    answer_table,
    before_after_table,
    category_table,
    differences,
)
from rpt_lightning.evaluation.tables.breakdown import NOT_MEASURED, further_comparisons, sampling_table
from rpt_lightning.evaluation.tables.by_field import field_tables
from rpt_lightning.evaluation.tables.stages import (
    INTERVAL_NOTE,
    Stage,
    comparison_line,
    difficulty_table,
    markdown_row,
    markdown_table,
    stage_table,
)  # fmt: skip
from rpt_lightning.records.results import Results, pair_results

COST_NOTE = (
    "Cost up to the validated step. Training before the run (a cold start) and validation are left out. "
    "Tokens are those that went through the model, with shared prefixes counted once. FLOPs are 2 x "
    "parameters for each token forward, 6 x forward and backward, plus attention's products. Recomputation "
    "is not counted."
)


def compare(runs: list[Path], *, output: Path | None = None) -> None:
    """Compare runs: accuracy at the same positions, cost, and differences from the first run.

    Accuracy is shown with and without reasoning. Differences are paired.

    Args:
        runs: Run folders (the value of trainer.default_root_dir), or folders that `rpt evaluate` wrote for
            a policy.
        output: Also write the text to this file.
    """
    text = comparison(read_runs([Path(run) for run in runs]))
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


def comparison(runs: Sequence[Run]) -> str:
    """Write the whole comparison in Markdown.

    It covers held-out positions and questions, whichever all runs were asked. The text also says what only
    some runs were asked.

    Raises:
        ValueError: Nothing was asked of all runs, or two runs were asked different positions or questions.
    """
    unvalidated = [run.name for run in runs if not run.validations]
    unasked = [run.name for run in runs if not run.answers]
    if unvalidated and unasked:
        raise ValueError(
            f"{unvalidated[0]}: was never validated at held-out positions, and {unasked[0]} was asked no "
            "questions, so no comparison covers all runs. Run `rpt validate ... --ckpt_path last` into each "
            "run's folder, on the same positions or questions"
        )
    parts = []
    if not unvalidated:
        parts.append(position_comparison(runs))
    elif len(unvalidated) < len(runs):
        parts.append(
            "Held-out positions are not compared, because some runs were not validated at any: "
            f"{', '.join(unvalidated)}.\n"
        )
    if not unasked:
        parts.append(answer_comparison(runs))
    elif len(unasked) < len(runs):
        parts.append(
            "Answers to questions are not compared, because some runs were asked none: "
            f"{', '.join(unasked)}.\n"
        )
    return "\n".join(parts)


def position_comparison(runs: Sequence[Run]) -> str:
    """Compare the runs at the positions of their last validation.

    Includes cost and the paired differences to the first run.
    """
    stages = [Stage(name=run.name, results=_validated(run)) for run in runs]
    tables = [stage_table(stages), sampling_table(stages), difficulty_table(stages), *field_tables(stages)]
    parts = [*tables, cost_table(runs), COST_NOTE, INTERVAL_NOTE]
    lines = [line for stage in stages[1:] for line in _differences(stages[0], stage)]
    return "\n\n".join(part for part in [*parts, "\n".join(lines)] if part) + "\n"


def answer_comparison(runs: Sequence[Run]) -> str:
    """Compare the runs' answers to questions: the last answers, and those before and after training."""
    stages = [
        [AnswerStage(name=run.name, results=results) for results in run.answers.values()] for run in runs
    ]
    last = [of_run[-1] for of_run in stages]
    parts = [
        before_after_table(stages),
        answer_table(last),
        category_table(last),
        NOTE,
        "\n".join(differences(last)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def cost_table(runs: Sequence[Run]) -> str:
    """Build the table of each run's cost.

    It shows tokens by part, FLOPs (also as a multiple of the first run's), and seconds by phase.
    """
    metrics = {
        "tokens: prompts computed": "rollout/prefill_tokens",
        "tokens: sampled": "rollout/tokens",
        "tokens: scored without gradient": "cost/scored_tokens",
        "tokens: trained": "cost/trained_tokens",
        "tokens, all": TOKENS,
        "model FLOPs": FLOPS,
        "seconds: rollouts": "time/rollout_s",
        "seconds: training": "time/train_s",
        "seconds: weights to the engine": "time/sync_s",
        "seconds, all": SECONDS,
    }
    rows = [markdown_row("steps", [_validated(run).step for run in runs])]
    for name, metric in metrics.items():
        form: Callable[[float], str] = "{:.4g}".format if metric == FLOPS else "{:,.0f}".format
        totals = [_cost(run, metric) for run in runs]
        rows.append(markdown_row(name, ["not logged" if value is None else form(value) for value in totals]))
        if metric in (FLOPS, SECONDS) and totals[0]:
            ratios = [NOT_MEASURED if value is None else f"{value / totals[0]:.2f}" for value in totals]
            rows.append(markdown_row(f"{name.removesuffix(', all')} / those of {runs[0].name}", ratios))
    return markdown_table("cost of training", [run.name for run in runs], rows)


def _cost(run: Run, metric: str) -> float | None:
    """Sum a cost up to the validated step. At step 0 nothing was trained yet, whatever came later."""
    step = _validated(run).step
    return total(run, metric, last_step=step) if step and run.steps else None


def _differences(first: Stage, second: Stage) -> list[str]:
    """Compare ``second`` with ``first``, each mode with the same mode.

    If one of the two reasons, its reasoning is also compared with the other's next-token prediction.
    """
    lines = []
    if first.has_reasoning and second.has_reasoning:
        lines.append(
            comparison_line(
                f"reasoning {second.name} - reasoning {first.name}",
                compare_policies(first.results, second.results),
            )
        )
    lines += further_comparisons([first, second])
    pairs = pair_results(first.results, second.results)
    units = [one.doc_id for one, _ in pairs]
    if second.has_reasoning:
        gain = paired_bootstrap(
            [one.ntp_correct for one, _ in pairs],
            [bool(other.reasoning_correct) for _, other in pairs],
            units=units,
        )
        lines.append(comparison_line(f"reasoning {second.name} - NTP {first.name}", gain))
    if first.has_reasoning:
        gain = paired_bootstrap(
            [bool(one.reasoning_correct) for one, _ in pairs],
            [other.ntp_correct for _, other in pairs],
            units=units,
        )
        lines.append(comparison_line(f"NTP {second.name} - reasoning {first.name}", gain))
    loss = paired_bootstrap(
        [-one.ntp_logprob for one, _ in pairs], [-other.ntp_logprob for _, other in pairs], units=units
    )
    lines.append(
        f"- NTP loss {second.name} - {first.name}: {loss.difference:+.4f} nats, 95 % interval "
        f"[{loss.low:+.4f}, {loss.high:+.4f}]"
    )
    return lines


def _validated(run: Run) -> Results:
    assert run.last_validation is not None
    return run.last_validation
