"""What several seeds of one experiment show together, in Markdown.

Inside a seed a difference has the interval of a paired bootstrap over documents. Over seeds there are the mean, whose interval is the same bootstrap of the
outcomes averaged a position, and the spread: the first says how far other documents would move it, the second how far another run would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rpt_lightning.evaluation import marked_section
from rpt_lightning.evaluation.compare import paired_bootstrap
from rpt_lightning.evaluation.scaling_figure import scaling_curves, scaling_text
from rpt_lightning.evaluation.seed_record import POLICIES, PolicyName, SeedRecord
from rpt_lightning.evaluation.table import Rate, above, markdown_row
from rpt_lightning.metrics.bands import BANDS
from rpt_lightning.metrics.results import PositionResult

BEGIN, END = "<!-- seeds: written by scripts/reproduction.py summary -->", "<!-- end of seeds -->"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One way of answering: a policy, by reasoning or without (NTP)."""

    name: str
    policy: PolicyName
    by_reasoning: bool

    def of(self, record: SeedRecord, threshold: float) -> list[bool]:
        """At the positions above an entropy, in the record's order."""
        positions = above(record.last(self.policy).results.positions, threshold)
        return [bool(p.reasoning_correct if self.by_reasoning else p.ntp_correct) for p in positions]


BEFORE = Outcome(name="reasoning before RPT", policy="cold start", by_reasoning=True)
AFTER = Outcome(name="reasoning after RPT", policy="RPT", by_reasoning=True)
NTP_START = Outcome(name="NTP of the untrained model", policy="start", by_reasoning=False)
NTP_BEFORE = Outcome(name="NTP before RPT", policy="cold start", by_reasoning=False)
NTP_AFTER = Outcome(name="NTP after RPT", policy="RPT", by_reasoning=False)
NTP_CONTINUAL = Outcome(name="NTP after continual NTP at RPT's FLOPs", policy="continual NTP", by_reasoning=False)
OUTCOMES = (BEFORE, AFTER, NTP_START, NTP_BEFORE, NTP_AFTER, NTP_CONTINUAL)
# Each is set against reasoning after RPT.
REFERENCES = (BEFORE, NTP_AFTER, NTP_BEFORE, NTP_START, NTP_CONTINUAL)


def seed_summary(records: Sequence[SeedRecord]) -> str:
    """Accuracies, differences, cost and scaling of all seeds.

    Raises:
        ValueError: Seeds of different positions.
    """
    if not records:
        return "No seed has been run yet.\n"
    records = sorted(records, key=lambda record: record.seed)
    _check_positions(records)
    positions = _positions(records[0])
    num_documents = len({position.doc_id for position in positions})
    intro = f"{_number(len(records), 'seed')}, {len(positions):,} held-out positions of {num_documents} documents, the same for every seed."
    scaling = [_scaling(record) for record in records]
    return "\n\n".join([intro, *(band_table(records, band) for band in BANDS), NOTE, cost_table(records), *scaling]) + "\n"


NOTE = (
    "Accuracies have Wilson's intervals, which take positions as independent; differences (points) have those of a paired bootstrap over documents, 95 %. "
    "Over seeds: the mean, for differences with the bootstrap's interval of the outcomes averaged over seeds; then the lowest to the highest seed."
)


def band_table(records: Sequence[SeedRecord], band: str) -> str:
    """One difficulty: each way of answering, then reasoning after RPT minus each of the others, a column a seed."""
    threshold = BANDS[band]
    units = [position.doc_id for position in above(_positions(records[0]), threshold)]
    title = f"{band}: entropy > {threshold}, {_number(len(units), 'position')}"
    columns = [f"seed {record.seed}" for record in records]
    over_seeds = ["mean; lowest to highest seed"] if len(records) > 1 else []
    rows = [markdown_row(title, [*columns, *over_seeds]), markdown_row("---", ["---"] * len([*columns, *over_seeds]))]
    if not units:
        return "\n".join(rows)
    for outcome in OUTCOMES:
        rates = [Rate.of(outcome.of(record, threshold)) for record in records]
        spread = _spread([rate.mean for rate in rates], "{:.1f} %")
        rows.append(markdown_row(outcome.name, [*rates, *([spread] if over_seeds else [])]))
    for reference in REFERENCES:
        pairs = [(reference.of(record, threshold), AFTER.of(record, threshold)) for record in records]
        means = [[fmean(values) for values in zip(*side, strict=True)] for side in zip(*pairs, strict=True)]  # [2, positions], over seeds
        cells = [_difference(first, second, units) for first, second in pairs]
        gains = [fmean(second) - fmean(first) for first, second in pairs]
        spread = f"{_difference(means[0], means[1], units)}; {_ends(gains, '{:+.1f}')}"
        rows.append(markdown_row(f"reasoning after RPT - {reference.name}", [*cells, *([spread] if over_seeds else [])]))
    return "\n".join(rows)


def cost_table(records: Sequence[SeedRecord]) -> str:
    """What RPT and the baseline cost, and how long the seed took."""
    rows = [markdown_row("loss, cost and length", [f"seed {record.seed}" for record in records]), markdown_row("---", ["---"] * len(records))]
    rpt, ntp = ([record.last(policy) for record in records] for policy in ("RPT", "continual NTP"))
    losses = [[-fmean(p.ntp_logprob for p in record.last(policy).results.positions) for policy in POLICIES] for record in records]
    rows += [
        markdown_row(f"NTP loss (nats): {', '.join(POLICIES)}", [", ".join(f"{loss:.3f}" for loss in row) for row in losses]),
        markdown_row("RPT: steps", [one.step for one in rpt]),
        markdown_row("RPT: model FLOPs, rollouts included", [f"{one.flops:.3g}" for one in rpt]),
        markdown_row("continual NTP: steps", [one.step for one in ntp]),
        markdown_row("continual NTP: model FLOPs", [f"{one.flops:.3g}" for one in ntp]),
        markdown_row("continual NTP: passes over the training text", [f"{record.about['ntp_passes']:.1f}" for record in records]),
        markdown_row("mean length of a completion after RPT (tokens)", [one.mean_length for one in rpt]),
        markdown_row("minutes of this seed alone", [_minutes(record) for record in records]),
        markdown_row("precision; machine", [f"{record.about['precision']}; {record.about['machine']}" for record in records]),
        markdown_row("commit", [record.about["commit"] for record in records]),
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
            raise ValueError(f"seeds {records[0].seed} and {record.seed} were measured at different positions, so they are not of one experiment")


def _positions(record: SeedRecord) -> tuple[PositionResult, ...]:
    return record.measured[0].results.positions


def _minutes(record: SeedRecord) -> str:
    """Stages whose time is not known make the sum unknown."""
    seconds = [stage["seconds"] for stage in record.about["stages"]]
    return "not recorded" if None in seconds else f"{sum(seconds) / 60:.0f}"


def _difference(first: Sequence[float], second: Sequence[float], units: Sequence[str]) -> str:
    gain = paired_bootstrap(first, second, units=units)
    return f"{100 * gain.difference:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def _spread(values: Sequence[float], form: str) -> str:
    return f"{form.format(100 * fmean(values))}; {_ends(values, form)}"


def _ends(values: Sequence[float], form: str) -> str:
    return f"{form.format(100 * min(values))} to {form.format(100 * max(values))}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
