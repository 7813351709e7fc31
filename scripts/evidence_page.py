"""The tables and figures of docs/evidence.md, made from the records of `make evidence`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from evidence_answers import SECTION as ANSWERS
from evidence_answers import answers_table
from evidence_arms import (
    ARMS,
    BUDGET,
    DEPTH,
    NOISE,
    OBJECTIVE,
    OBJECTIVES,
    REWARD,
    RIVAL,
    SAMPLING,
    SHARE,
    STEP,
    WORLDS,
    Arm,
    objective_arm,
)
from evidence_records import QUESTIONS, ArmRecord, read_records
from evidence_scaling import law_table, plot_laws, read_curves

from rpt_lightning.evaluation.marked_section import replace_section
from rpt_lightning.evaluation.paired_bootstrap import paired_bootstrap
from rpt_lightning.evaluation.tables.stages import Rate, interval_text, markdown_row, markdown_table

RECORDS = Path("docs/evidence")
PAGE = Path("docs/evidence.md")
GROUPS = (SHARE, DEPTH, REWARD, STEP, RIVAL, SAMPLING, NOISE, BUDGET, OBJECTIVE)
DEPTHS = {"2 to 4": range(1, 5), "5 to 7": range(5, 8), "8 to 12": range(8, 13)}
DEPTH_ARMS = ("base", "depth-1-4", "depth-8-12", "trained-short", "ntp", "sft")
Records = dict[int, dict[str, ArmRecord]]  # by seed, then by arm


def read_all() -> Records:
    """Read the records of every seed that has a file."""
    paths = sorted(RECORDS.glob("seed-*.json"))
    return {int(path.stem.removeprefix("seed-")): read_records(path) for path in paths}


def of_arm(records: Records, name: str) -> dict[int, ArmRecord]:
    """Return an arm's records, keyed by the seeds that have run it."""
    return {seed: arms[name] for seed, arms in records.items() if name in arms}


def question_of(arm: Arm) -> str:
    """Return the question that measures an arm.

    The next-token arm was never asked to think, so we measure its direct next-token prediction.
    """
    return "ntp" if arm.kind == "ntp" else "reasoning"


def pooled(found: dict[int, ArmRecord], question: str, depths: range | None = None) -> Rate:
    """Return the share of right answers over the positions of all seeds."""
    rates = [record.rate(question, depths) for record in found.values()]
    return Rate(sum(rate.successes for rate in rates), sum(rate.count for rate in rates))


def group_table(records: Records, group: str) -> str:
    """Tabulate what we expected of each arm in a group, and its result in each seed."""
    # Only runs on the same machine begin with the same weights and share their held-out positions.
    reference = objective_arm("rpt", "12 % think") if group == BUDGET else "base"
    rows = []
    for arm in ARMS:
        found = of_arm(records, arm.name)
        if arm.group != group or not found:
            continue
        name = question_of(arm)
        cells = [
            arm.expected,
            ", ".join(_short(record.rate(name)) for record in found.values()),
            pooled(found, name),
            _ntp(arm, found),
        ]
        rows.append(
            markdown_row(
                f"**{arm.name}**: {arm.what}",
                [
                    *cells,
                    _difference(records, arm, reference),
                    _change(found, "reward"),
                    _change(found, "length"),
                ],
            )
        )
    columns = [
        "expected",
        "each seed",
        "all seeds",
        "next token at once, same positions",
        f"minus {reference} (points)",
        "mean reward",
        "length",
    ]
    return markdown_table(group, columns, rows)


def _ntp(arm: Arm, found: dict[int, ArmRecord]) -> str:
    return "the same" if arm.kind == "ntp" else str(pooled(found, "ntp"))


def _short(rate: Rate) -> str:
    return f"{100 * rate.mean:.1f} %"


def _change(found: dict[int, ArmRecord], curve: str) -> str:
    """Format a curve's first and last values, averaged over seeds."""
    values = [record.curves[curve] for record in found.values() if record.curves[curve]]
    if not values:
        return "-"
    first, last = fmean(value[0] for value in values), fmean(value[-1] for value in values)
    return f"{first:.2f} -> {last:.2f}" if curve == "reward" else f"{first:.0f} -> {last:.0f}"


def _difference(records: Records, arm: Arm, reference: str) -> str:
    """Format the difference from another arm, paired by position over all seeds."""
    if arm.name == reference:
        return "-"
    base, other, units = [], [], []
    for seed, record in of_arm(records, arm.name).items():
        marks = records[seed][reference].right["reasoning"]
        base += [mark == "1" for mark in marks]
        other += [mark == "1" for mark in record.right[question_of(arm)]]
        units += [f"{seed}:{number}" for number in range(len(marks))]
    difference = paired_bootstrap(base, other, units=units)
    return f"{100 * difference.difference:+.1f} {interval_text(difference.low, difference.high)}"


def objective_table(records: Records) -> str:
    """Tabulate the objectives in each world beside plain RPT there: accuracy, cost and length."""
    named = {arm.name: arm for arm in ARMS}
    rows = []
    for world in WORLDS:
        plain = objective_arm("rpt", world)
        for objective in OBJECTIVES:
            arm = named[objective_arm(objective, world)]
            found = of_arm(records, arm.name)
            if not found:
                continue
            cells = [
                arm.expected,
                ", ".join(_short(record.rate("reasoning")) for record in found.values()),
                pooled(found, "reasoning"),
                pooled(found, "ntp"),
                _difference(records, arm, plain),
                _cost(records, arm, plain),
                _change(found, "length"),
            ]
            rows.append(markdown_row(f"{world}: **{objective}**", cells))
    columns = [
        "expected",
        "each seed",
        "all seeds",
        "next token at once, same positions",
        "minus rpt (points)",
        "FLOPs, relative to rpt",
        "length",
    ]
    return markdown_table(OBJECTIVE, columns, rows)


def _cost(records: Records, arm: Arm, reference: str) -> str:
    """Format an arm's FLOPs as a multiple of another arm's in the same seeds."""
    found = of_arm(records, arm.name)
    own = sum(record.flops for record in found.values())
    return f"{own / sum(records[seed][reference].flops for seed in found):.2f} x"


def control_table(records: Records) -> str:
    """Tabulate the base policy with its own thought, without a thought, and with control thoughts."""
    found = of_arm(records, "base")
    rows = [
        markdown_row(name, [*(_short(record.rate(name)) for record in found.values()), pooled(found, name)])
        for name in QUESTIONS
        if all(name in record.right for record in found.values())
    ]
    return markdown_table("the base arm's answers", [*(f"seed {seed}" for seed in found), "all seeds"], rows)


def depth_table(records: Records) -> str:
    """Tabulate accuracy by serial depth over all seeds."""
    rows = []
    for arm in ARMS:
        found = of_arm(records, arm.name)
        if arm.name in DEPTH_ARMS and found:
            rows.append(
                markdown_row(
                    arm.name, [pooled(found, question_of(arm), depths) for depths in DEPTHS.values()]
                )
            )
    return markdown_table("accuracy by serial depth", list(DEPTHS), rows)


def plot_curves(records: Records, path: Path) -> None:
    """Plot the mean reward at each step, with one panel per group and one line per arm.

    The line is the mean over seeds. The band spans the lowest to the highest seed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [
        group
        for group in GROUPS
        if group != OBJECTIVE
        and any(arm.group == group and arm.kind == "rpt" and of_arm(records, arm.name) for arm in ARMS)
    ]
    figure = Figure(figsize=(13, 3.2 * -(-len(groups) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(-(-len(groups) // 3), 3, squeeze=False).flat
    for panel, group in zip(panels, groups, strict=False):
        for arm in (arm for arm in ARMS if arm.kind == "rpt" and (arm.group == group or arm.name == "base")):
            curves = [record.curves["reward"] for record in of_arm(records, arm.name).values()]
            if curves:
                _band(
                    panel, curves, arm.name, colour="0.5" if arm.name == "base" and group != SHARE else None
                )
        panel.set_title(group, fontsize=10)
        panel.set_xlabel("step")
        panel.set_ylabel("mean reward")
        panel.set_ylim(0, 1.02)
        panel.legend(fontsize=7, frameon=False)
    for panel in list(figure.axes)[len(groups) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=110)


def _band(panel, curves: Sequence[Sequence[float]], name: str, *, colour: str | None) -> None:
    length = min(map(len, curves))
    steps = range(1, length + 1)
    values = [[curve[step - 1] for curve in curves] for step in steps]
    (line,) = panel.plot(steps, [fmean(value) for value in values], label=name, linewidth=1.5, color=colour)
    panel.fill_between(
        steps,
        [min(value) for value in values],
        [max(value) for value in values],
        alpha=0.15,
        color=line.get_color(),
        linewidth=0,
    )


def plot_depths(records: Records, path: Path) -> None:
    """Plot accuracy at each depth over the positions of all seeds, with Wilson's intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for number, arm in enumerate(arm for arm in ARMS if arm.name in DEPTH_ARMS and of_arm(records, arm.name)):
        found = of_arm(records, arm.name)
        depths = sorted({depth for record in found.values() for depth in record.depths})
        rates = [pooled(found, question_of(arm), range(depth, depth + 1)) for depth in depths]
        means = [100 * rate.mean for rate in rates]
        errors = [[mean - 100 * rate.interval[0] for mean, rate in zip(means, rates, strict=True)]]
        errors.append([100 * rate.interval[1] - mean for mean, rate in zip(means, rates, strict=True)])
        places = [depth + 0.06 * (number - 2) for depth in depths]
        panel.errorbar(
            places,
            means,
            yerr=errors,
            fmt="o-",
            capsize=2,
            markersize=3,
            linewidth=1.3,
            label=f"{arm.name}: {arm.what}",
        )
    panel.axhline(12.5, color="0.6", linestyle=":", linewidth=1)
    panel.set_xlabel("serial depth (moves)")
    panel.set_ylabel("held-out accuracy, % (95 % intervals)")
    panel.set_ylim(-3, 103)
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def write_page() -> None:
    """Update the generated parts of docs/evidence.md: one table per group, and the figures."""
    records = read_all()
    text = PAGE.read_text(encoding="utf-8")
    sections = {group: group_table(records, group) for group in GROUPS if group != OBJECTIVE}
    sections |= {OBJECTIVE: objective_table(records)}
    sections |= {"thought controls": control_table(records), "by depth": depth_table(records)}
    sections[ANSWERS] = answers_table()
    curves = read_curves(RECORDS)
    if curves:
        sections["scaling"] = law_table(curves)
        plot_laws(curves, RECORDS / "scaling.png")
    for name, table in sections.items():
        text = replace_section(
            text, f"{table}\n", begin=f"<!-- {name} -->", end=f"<!-- end of {name} -->", where=str(PAGE)
        )
    PAGE.write_text(text, encoding="utf-8")
    plot_curves(records, RECORDS / "rewards.png")
    plot_depths(records, RECORDS / "depths.png")
    print(f"{PAGE}: {len(records)} seeds, {sum(map(len, records.values()))} records")
