"""What several seeds of one experiment show together, in Markdown.

Inside a seed a difference has the interval of a paired bootstrap over documents. The mean over seeds has two: the same bootstrap of the outcomes averaged a
position, which says how far other documents would move it with these runs, and Student's over the seeds' gains, which says how far other runs would with
these documents. A claim about RPT needs both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rpt_lightning.evaluation import marked_section
from rpt_lightning.evaluation.compare import Difference, interval_over_runs, paired_bootstrap
from rpt_lightning.evaluation.scaling_figure import scaling_curves, scaling_text
from rpt_lightning.evaluation.seed_record import POLICIES, PolicyName, SeedRecord
from rpt_lightning.evaluation.table import Rate, above, interval_text, markdown_row
from rpt_lightning.metrics.bands import BANDS
from rpt_lightning.metrics.interval import clustered_interval
from rpt_lightning.metrics.results import PositionResult

BEGIN, END = "<!-- seeds: written by scripts/reproduction.py summary -->", "<!-- end of seeds -->"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One way of answering: a policy, by reasoning or without (NTP)."""

    name: str
    policy: PolicyName
    by_reasoning: bool

    def of(self, record: SeedRecord, threshold: float) -> list[bool]:
        """At the positions above an entropy, in the record's order. Raises ValueError where the policy was not asked in this way."""
        positions = above(record.last(self.policy).results.positions, threshold)
        outcomes = [p.reasoning_correct if self.by_reasoning else p.ntp_correct for p in positions]
        measured = [outcome for outcome in outcomes if outcome is not None]
        if len(measured) < len(outcomes):
            raise ValueError(
                f"seed {record.seed}: {self.name} was not measured at {len(outcomes) - len(measured)} of {len(outcomes)} positions"
            )
        return measured


BEFORE = Outcome(name="reasoning before RPT", policy="cold start", by_reasoning=True)
AFTER = Outcome(name="reasoning after RPT", policy="RPT", by_reasoning=True)
NTP_START = Outcome(name="NTP of the untrained model", policy="start", by_reasoning=False)
NTP_BEFORE = Outcome(name="NTP before RPT", policy="cold start", by_reasoning=False)
NTP_AFTER = Outcome(name="NTP after RPT", policy="RPT", by_reasoning=False)
NTP_CONTINUAL = Outcome(
    name="NTP after continual NTP from the cold start, at RPT's FLOPs",
    policy="continual NTP",
    by_reasoning=False,
)
OUTCOMES = (BEFORE, AFTER, NTP_START, NTP_BEFORE, NTP_AFTER, NTP_CONTINUAL)
# Each is set against reasoning after RPT.
REFERENCES = (BEFORE, NTP_AFTER, NTP_BEFORE, NTP_START, NTP_CONTINUAL)


def seed_summary(records: Sequence[SeedRecord]) -> str:
    """Accuracies, differences, cost and scaling of all seeds.

    Raises:
        ValueError: Seeds that are not of one experiment: of different positions, another cold start, or with other steps of RPT.
    """
    if not records:
        return "No seed has been run yet.\n"
    records = sorted(records, key=lambda record: record.seed)
    _check_positions(records)
    _check_origin(records)
    positions = _positions(records[0])
    num_documents = len({position.doc_id for position in positions})
    intro = f"{_number(len(records), 'seed')}, {len(positions):,} held-out positions of {num_documents} documents, the same for every seed."
    scaling = [_scaling(record) for record in records]
    return (
        "\n\n".join(
            [intro, *(band_table(records, band) for band in BANDS), NOTE, cost_table(records), *scaling]
        )
        + "\n"
    )


NOTE = (
    "All intervals are of 95 %. Those of accuracies take the positions of a document together (Wilson's, with the effective number of positions); those of "
    "differences, in points, are a paired bootstrap over documents (10,000 resamples, percentiles). Behind the mean over seeds stand two: `documents`, the "
    "same bootstrap of the outcomes averaged over seeds, in which these runs are fixed, and `runs`, Student's interval over the seeds, in which these documents "
    "are; a claim needs both. The difficulties are nested, so that three rows are largely one finding, and nothing is corrected for the number of intervals: the "
    "comparisons that this was made for are reasoning after RPT with reasoning before and with continual NTP, at easy positions."
)


def band_table(records: Sequence[SeedRecord], band: str) -> str:
    """One difficulty: each way of answering, then reasoning after RPT minus each of the others, a column a seed."""
    threshold = BANDS[band]
    units = [position.doc_id for position in above(_positions(records[0]), threshold)]
    title = f"{band}: entropy > {threshold}, {_number(len(units), 'position')} of {_number(len(set(units)), 'document')}"
    columns = [f"seed {record.seed}" for record in records]
    over_seeds = ["over seeds"] if len(records) > 1 else []
    rows = [
        markdown_row(title, [*columns, *over_seeds]),
        markdown_row("---", ["---"] * len([*columns, *over_seeds])),
    ]
    if not units:
        return "\n".join(rows)
    for outcome in OUTCOMES:
        answers = [outcome.of(record, threshold) for record in records]
        spread = (
            "one measurement"
            if all(one == answers[0] for one in answers)
            else _spread([fmean(one) for one in answers])
        )
        rows.append(
            markdown_row(
                outcome.name, [*(_rate(one, units) for one in answers), *([spread] if over_seeds else [])]
            )
        )
    for reference in REFERENCES:
        pairs = [(reference.of(record, threshold), AFTER.of(record, threshold)) for record in records]
        means = [
            [fmean(values) for values in zip(*side, strict=True)] for side in zip(*pairs, strict=True)
        ]  # [2, positions], over seeds
        gains = [paired_bootstrap(first, second, units=units) for first, second in pairs]
        cells = [f"{_points(gain)} {interval_text(gain.low, gain.high)}" for gain in gains]
        if over_seeds:
            mean = paired_bootstrap(means[0], means[1], units=units)
            runs = interval_over_runs([gain.difference for gain in gains])
            cells.append(
                f"{_points(mean)}; documents {interval_text(mean.low, mean.high)}; runs {interval_text(*runs)}"
            )
        rows.append(markdown_row(f"reasoning after RPT - {reference.name}", cells))
    return "\n".join(rows)


def cost_table(records: Sequence[SeedRecord]) -> str:
    """What RPT and the baseline cost, and how long the seed took."""
    rows = [
        markdown_row("loss, cost and length", [f"seed {record.seed}" for record in records]),
        markdown_row("---", ["---"] * len(records)),
    ]
    rpt, ntp = ([record.last(policy) for record in records] for policy in ("RPT", "continual NTP"))
    losses = [
        [-fmean(p.ntp_logprob for p in record.last(policy).results.positions) for policy in POLICIES]
        for record in records
    ]
    rows += [
        markdown_row(
            f"NTP loss (nats): {', '.join(POLICIES)}",
            [", ".join(f"{loss:.3f}" for loss in row) for row in losses],
        ),
        markdown_row(
            "cold start, before both: model FLOPs",
            [f"{record.about['cold_start_flops']:.3g}" for record in records],
        ),
        markdown_row("RPT: steps", [one.step for one in rpt]),
        markdown_row("RPT: model FLOPs, rollouts included", [f"{one.flops:.3g}" for one in rpt]),
        markdown_row("continual NTP: steps", [one.step for one in ntp]),
        markdown_row("continual NTP: model FLOPs", [f"{one.flops:.3g}" for one in ntp]),
        markdown_row(
            "continual NTP: passes over the training text",
            [f"{record.about['ntp_passes']:.1f}" for record in records],
        ),
        markdown_row(
            "learning rate: RPT, continual NTP",
            [", ".join(f"{rate:g}" for rate in record.about["learning_rates"]) for record in records],
        ),
        markdown_row("mean length of a completion after RPT (tokens)", [one.mean_length for one in rpt]),
        markdown_row("minutes of this seed alone", [_minutes(record) for record in records]),
        markdown_row(
            "precision; machine",
            [f"{record.about['precision']}; {record.about['machine']}" for record in records],
        ),
        markdown_row("commits of the stages", [_commits(record) for record in records]),
    ]
    return "\n".join(rows)


def replace_section(text: str, section: str, *, where: str) -> str:
    """``text`` with ``section`` between the markers of the summary. Raises ValueError where they are not there once each, in order."""
    return marked_section.replace_section(text, section, begin=BEGIN, end=END, where=where)


def _scaling(record: SeedRecord) -> str:
    run = record.as_run()
    try:
        return scaling_text(run, scaling_curves(run))
    except ValueError as error:
        return f"No scaling fit: {error}"


def _check_positions(records: Sequence[SeedRecord]) -> None:
    first, *others = ([(p.task_id, p.entropy) for p in _positions(record)] for record in records)
    for record, other in zip(records[1:], others, strict=True):
        if other != first:
            raise ValueError(
                f"seeds {records[0].seed} and {record.seed} were measured at different positions, so they are not of one experiment"
            )


def _check_origin(records: Sequence[SeedRecord]) -> None:
    for what, values in (
        ("cold start", [record.about["cold_start_sha256"] for record in records]),
        ("number of steps", [record.last("RPT").step for record in records]),
    ):
        for record, value in zip(records[1:], values[1:], strict=True):
            if value != values[0]:
                raise ValueError(
                    f"seeds {records[0].seed} and {record.seed} have another {what} ({values[0]} and {value}), so they are not of one experiment"
                )


def _positions(record: SeedRecord) -> tuple[PositionResult, ...]:
    return record.measured[0].results.positions


def _minutes(record: SeedRecord) -> str:
    """Stages whose time is not known make the sum unknown."""
    seconds = [stage["seconds"] for stage in record.about["stages"]]
    return "not recorded" if None in seconds else f"{sum(seconds) / 60:.0f}"


def _commits(record: SeedRecord) -> str:
    """Of the programs that ran the stages, not of the one that wrote the record."""
    return ", ".join(
        dict.fromkeys(
            str(stage["commit"] or "unknown")
            for stage in (*record.about["shared_stages"], *record.about["stages"])
        )
    )


def _rate(outcomes: Sequence[bool], units: Sequence[str]) -> Rate:
    """With the positions of a document taken together."""
    of_unit: dict[str, list[bool]] = {}
    for outcome, unit in zip(outcomes, units, strict=True):
        of_unit.setdefault(unit, []).append(outcome)
    ends = clustered_interval(
        [fmean(own) for own in of_unit.values()], samples_each=[len(own) for own in of_unit.values()]
    )
    return Rate(sum(outcomes), len(outcomes), ends)


def _points(gain: Difference) -> str:
    return f"{100 * gain.difference:+.1f}"


def _spread(values: Sequence[float]) -> str:
    return f"mean {100 * fmean(values):.1f} %, from {100 * min(values):.1f} to {100 * max(values):.1f}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
