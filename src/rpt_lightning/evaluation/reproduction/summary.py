"""Markdown summary of several seeds of one experiment.

Within a seed, a difference has the interval of a paired bootstrap over documents. The mean over seeds has
two intervals. The first is the same bootstrap of the outcomes averaged at each position. It says how far
other documents would move the mean with these runs. The second is Student's over the gains of the seeds. It
says how far other runs would move the mean with these documents. We claim a difference only if neither
interval contains 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rpt_lightning.evaluation import marked_section
from rpt_lightning.evaluation.paired_bootstrap import Difference, interval_over_runs, paired_bootstrap
from rpt_lightning.evaluation.reproduction.record import POLICIES, PolicyName, SeedRecord
from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.evaluation.scaling.figure import scaling_curves, scaling_text
from rpt_lightning.evaluation.tables.stages import Rate, above, interval_text, markdown_row
from rpt_lightning.metrics.difficulty_bands import BANDS
from rpt_lightning.metrics.interval import clustered_interval
from rpt_lightning.records.results import PositionResult

BEGIN, END = "<!-- seeds: written by scripts/reproduction.py summary -->", "<!-- end of seeds -->"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One way of answering: a policy, with or without reasoning (NTP)."""

    name: str
    policy: PolicyName
    by_reasoning: bool

    def of(self, record: SeedRecord, threshold: float) -> list[bool]:
        """Return the outcomes at the positions above an entropy, in the record's order.

        Raises ValueError if the policy was not asked in this way.
        """
        positions = above(record.last(self.policy).results.positions, threshold)
        outcomes = [p.reasoning_correct if self.by_reasoning else p.ntp_correct for p in positions]
        measured = [outcome for outcome in outcomes if outcome is not None]
        if len(measured) < len(outcomes):
            raise ValueError(
                f"seed {record.seed}: {self.name} was not measured at {len(outcomes) - len(measured)} of "
                f"{len(outcomes)} positions"
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
# Reasoning after RPT is compared with each of these.
REFERENCES = (BEFORE, NTP_AFTER, NTP_BEFORE, NTP_START, NTP_CONTINUAL)


def seed_summary(records: Sequence[SeedRecord]) -> str:
    """Write the accuracies, differences, cost and scaling of all seeds.

    Raises:
        ValueError: The seeds do not belong to one experiment: their positions, cold starts or numbers of
            RPT steps differ.
    """
    if not records:
        return "No seed has been run yet.\n"
    records = sorted(records, key=lambda record: record.seed)
    _check_positions(records)
    _check_origin(records)
    positions = _positions(records[0])
    num_documents = len({position.doc_id for position in positions})
    intro = (
        f"{_number(len(records), 'seed')}, {len(positions):,} held-out positions of {num_documents} "
        "documents, the same for every seed."
    )
    scaling = _scaling_section(records)
    return (
        "\n\n".join(
            [intro, *(band_table(records, band) for band in BANDS), NOTE, cost_table(records), *scaling]
        )
        + "\n"
    )


NOTE = (
    "All intervals are 95 % intervals. The intervals of accuracies are Wilson's. They treat the positions "
    "of a document as one cluster, by using the effective number of positions. The intervals of "
    "differences are in points and come from a paired bootstrap over documents (10,000 resamples, "
    "percentiles). The mean over seeds has two intervals. `documents` is the same bootstrap, applied to "
    "the outcomes averaged over seeds, with these runs fixed. `runs` is Student's interval over the "
    "seeds, with these documents fixed. We claim a difference only if neither interval contains 0. The "
    "difficulties are nested, so their three tables largely show the same finding, and we do not correct "
    "for the number of intervals. The experiment was designed for two comparisons at easy positions. They "
    "compare reasoning after RPT with reasoning before RPT, and with continual NTP."
)


def band_table(records: Sequence[SeedRecord], band: str) -> str:
    """Build the table of one difficulty, with one column for each seed.

    It shows each way of answering, then the differences between reasoning after RPT and the others.
    """
    threshold = BANDS[band]
    units = [position.doc_id for position in above(_positions(records[0]), threshold)]
    title = (
        f"{band}: entropy > {threshold}, {_number(len(units), 'position')} of "
        f"{_number(len(set(units)), 'document')}"
    )
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
                f"{_points(mean)}; documents {interval_text(mean.low, mean.high)}; "
                f"runs {interval_text(*runs)}"
            )
        rows.append(markdown_row(f"reasoning after RPT - {reference.name}", cells))
    return "\n".join(rows)


def cost_table(records: Sequence[SeedRecord]) -> str:
    """Build the table of the cost of RPT and the baseline, and the duration of each seed."""
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
    """Return ``text`` with ``section`` between the markers of the summary.

    Raises ValueError if the markers do not each occur once, in order.
    """
    return marked_section.replace_section(text, section, begin=BEGIN, end=END, where=where)


def _scaling_section(records: Sequence[SeedRecord]) -> list[str]:
    """Return one paragraph for each seed, or a single one if only last steps were evaluated."""
    runs = [record.as_run() for record in records]
    if all(len(run.validations) == 1 for run in runs):
        return ["There is no scaling fit, because these runs were only evaluated after their last step."]
    return [_scaling(run) for run in runs]


def _scaling(run: Run) -> str:
    try:
        return scaling_text(run, scaling_curves(run))
    except ValueError as error:
        return f"No scaling fit: {error}"


def _check_positions(records: Sequence[SeedRecord]) -> None:
    first, *others = ([(p.task_id, p.entropy) for p in _positions(record)] for record in records)
    for record, other in zip(records[1:], others, strict=True):
        if other != first:
            raise ValueError(
                f"seeds {records[0].seed} and {record.seed} were measured at different positions, so they do "
                "not belong to one experiment"
            )


def _check_origin(records: Sequence[SeedRecord]) -> None:
    for what, values in (
        ("cold start", [record.about["cold_start_sha256"] for record in records]),
        ("number of steps", [record.last("RPT").step for record in records]),
    ):
        for record, value in zip(records[1:], values[1:], strict=True):
            if value != values[0]:
                raise ValueError(
                    f"seeds {records[0].seed} and {record.seed} differ in their {what} ({values[0]} and "
                    f"{value}), so they do not belong to one experiment"
                )


def _positions(record: SeedRecord) -> tuple[PositionResult, ...]:
    return record.measured[0].results.positions


def _minutes(record: SeedRecord) -> str:
    """Return the sum of the stages' minutes, or "not recorded" if the time of any stage is unknown."""
    seconds = [stage["seconds"] for stage in record.about["stages"]]
    return "not recorded" if None in seconds else f"{sum(seconds) / 60:.0f}"


def _commits(record: SeedRecord) -> str:
    """Return the commits of the programs that ran the stages, not of the one that wrote the record."""
    return ", ".join(
        dict.fromkeys(
            str(stage["commit"] or "unknown")
            for stage in (*record.about["shared_stages"], *record.about["stages"])
        )
    )


def _rate(outcomes: Sequence[bool], units: Sequence[str]) -> Rate:
    """Return the rate of right answers, with the positions of a document as one cluster."""
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
