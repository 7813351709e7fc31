"""`make demo-text`: train a policy on text by next-token reasoning, then make a table, a plot and a report.

Every stage is one command that a user could type. The demo only runs them in order and keeps the time. If
interrupted, it continues where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import EXECUTABLE, Stage, run_stages, time_table
from stages import ENGINE, PREPARE_PRECISION, evaluate, export, fit, report, results_file, say_what_is_special

MODEL = Path("models/smollm2-135m")
TASKS = Path("tasks/demo-text")
DEMO = Path("runs/demo-text")
COLD_START = DEMO / "cold-start"
RPT = DEMO / "rpt"
RPT_CONFIG = "configs/demo-text.yaml"
REPORT = DEMO / "report.html"
# The name of each evaluation, and its policy.
EVALUATIONS = {"start": MODEL, "after cold start": COLD_START / "export", "after RPT": RPT / "export"}


def folder_of(evaluation: str) -> Path:
    return DEMO / evaluation.replace(" ", "-")


def make_model() -> Stage:
    command = (sys.executable, "scripts/make_model.py", "smollm2", "--output", str(MODEL))
    return Stage(name="model", command=lambda: command, output=MODEL, minutes=0.5, folder=DEMO)


def prepare() -> Stage:
    command = (EXECUTABLE, "prepare", "--config", "configs/prepare/demo-text.yaml", *PREPARE_PRECISION)
    return Stage(name="prepare", command=lambda: command, output=TASKS, minutes=4.4, folder=DEMO)


def evaluation(name: str, minutes: float, *, controls: bool = True) -> Stage:
    return evaluate(
        f"evaluate {name}",
        EVALUATIONS[name],
        folder_of(name),
        RPT_CONFIG,
        folder=DEMO,
        minutes=minutes,
        controls=controls,
    )


COLD_START_STAGES = (
    make_model(),
    prepare(),
    evaluation("start", 4, controls=False),  # the start has no answers that another thought could change
    fit("cold start", COLD_START, "configs/demo-text-cold-start.yaml", folder=DEMO, minutes=8.5),
    export(COLD_START, folder=DEMO),
    evaluation("after cold start", 5),
)
RPT_STAGES = (
    fit("RPT", RPT, RPT_CONFIG, folder=DEMO, minutes=28, options=ENGINE),
    export(RPT, folder=DEMO),
    evaluation("after RPT", 5),
)
STAGES = (
    *COLD_START_STAGES,
    *RPT_STAGES,
    report(
        RPT,
        (folder_of("start"),),
        REPORT,
        before=folder_of("after cold start"),
        after=folder_of("after RPT"),
        folder=DEMO,
    ),
)


def show() -> None:
    """Show the table and the plot, and say where the files are."""
    from rich.console import Console
    from rich.markdown import Markdown

    from rpt_lightning.evaluation.summary import summarise
    from rpt_lightning.evaluation.tables.stages import Stage as Column
    from rpt_lightning.records.results import read_results

    columns = [Column(name=name, results=read_results(results_file(folder_of(name)))) for name in EVALUATIONS]
    Console().print(Markdown(summarise(columns, RPT / "steps.jsonl", DEMO)))
    print(
        f"Table: {DEMO / 'summary.md'}   plot: {DEMO / 'summary.png'}   report: {REPORT}   "
        f"trained policy: {RPT / 'export'}"
    )
    print(time_table(STAGES))
    print(f"To start over: rm -r {DEMO} {TASKS}")


if __name__ == "__main__":
    say_what_is_special("demo-text")
    run_stages(STAGES, program="demo-text", again="make demo-text")
    show()
