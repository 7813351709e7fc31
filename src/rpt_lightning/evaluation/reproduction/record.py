"""One seed of an experiment, in a file small enough to be committed.

It records what the seed's policies did at every held-out position, and what that cost. An outcome is one
character for each position (1 right, 0 wrong, - not measured), so 2,000 positions under seven policies need
about 200 kB. Texts are left out. Means, intervals and fits are not stored either, because they can be
computed from the outcomes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

from rpt_lightning.evaluation.run_cost import FLOPS
from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.metrics.token_kind import TokenKind
from rpt_lightning.records.results import PositionResult, Results, pair_results

FORMAT = 1
OUTCOMES = (
    "reasoning_correct",
    "ntp_correct",
    "empty_thought_correct",
    "shuffled_thought_correct",
    "boxed",
    "truncated",
)
_CODES: dict[bool | None, str] = {True: "1", False: "0", None: "-"}
_OUTCOME_OF = {code: outcome for outcome, code in _CODES.items()}
_KIND_CODES: dict[TokenKind | None, str] = {
    "word": "w",
    "number": "n",
    "symbol": "y",
    "space": "s",
    None: "?",
}

PolicyName = Literal["start", "cold start", "RPT", "continual NTP"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measured policy.

    Attributes:
        policy: Which policy it is.
        step: Number of steps of the policy's own run.
        flops: Model FLOPs of those steps (policy/flops.py).
        results: The policy's answers. Results read from a file have neither texts nor lengths.
        mean_length: Mean tokens of a completion; None without reasoning.
    """

    policy: PolicyName
    step: int
    flops: float
    results: Results
    mean_length: float | None


@dataclass(frozen=True, kw_only=True)
class SeedRecord:
    """All policies of one seed, at the same positions.

    ``about`` names the machine, the commands and the times of the stages that made them.
    """

    seed: int
    about: dict[str, Any]
    measured: tuple[Measured, ...]

    def last(self, policy: PolicyName) -> Measured:
        """Return the measurement of a policy after the most steps."""
        return max((one for one in self.measured if one.policy == policy), key=lambda one: one.step)

    def as_run(self) -> Run:
        """Return the RPT run as `rpt scaling` reads it: its checkpoints and the training cost up to each."""
        checkpoints = sorted((one for one in self.measured if one.policy == "RPT"), key=lambda one: one.step)
        before = [0.0, *(one.flops for one in checkpoints)]
        return Run(
            name=f"seed {self.seed}",
            steps={
                one.step: {FLOPS: one.flops - spent} for one, spent in zip(checkpoints, before, strict=False)
            },
            validations={one.step: one.results for one in checkpoints},
            rollouts={},
        )


def measured(policy: PolicyName, results: Results, *, step: int, flops: float) -> Measured:
    """Build the record of a policy from the results of a validation."""
    lengths = [position.length for position in results.positions if position.length is not None]
    return Measured(
        policy=policy,
        step=step,
        flops=flops,
        results=results,
        mean_length=round(fmean(lengths), 2) if lengths else None,
    )


def write_record(record: SeedRecord, path: Path) -> None:
    """Write the record, with one line for each part.

    Raises:
        ValueError: The policies were measured at different positions.
    """
    first = record.measured[0].results
    documents = sorted({position.doc_id for position in first.positions})
    places = {document: place for place, document in enumerate(documents)}
    parts: dict[str, Any] = {
        "format": FORMAT,
        "seed": record.seed,
        **record.about,
        "documents": documents,
        "document": [places[p.doc_id] for p in first.positions],
        "position": [p.position for p in first.positions],
        # Nine digits distinguish all float32 values, so no position changes its band.
        "entropy": [float(f"{p.entropy:.9g}") for p in first.positions],
        "answerable": _encode([p.answerable for p in first.positions]),
        "kind": "".join(_KIND_CODES[p.token_kind] for p in first.positions),
        "policies": [
            _policy_parts(one, [other for _, other in pair_results(first, one.results)])
            for one in record.measured
        ],
    }
    lines = [f"{json.dumps(name)}: {_dump(value)}" for name, value in parts.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read_record(path: Path) -> SeedRecord:
    """Read a file that ``write_record`` wrote.

    Raises:
        ValueError: The file is not such a record, has another format, or has parts of different lengths.
    """
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        if parts.pop("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        seed, policies = parts.pop("seed"), parts.pop("policies")
        documents = parts.pop("documents")
        kinds = {code: kind for kind, code in _KIND_CODES.items()}
        positions = [
            {
                "task_id": f"{documents[place]}:{position}",
                "doc_id": documents[place],
                "position": position,
                "entropy": entropy,
                "answerable": answerable,
                "token_kind": kinds[kind],
            }
            for place, position, entropy, answerable, kind in zip(
                parts.pop("document"),
                parts.pop("position"),
                parts.pop("entropy"),
                _decode(parts.pop("answerable")),
                parts.pop("kind"),
                strict=True,
            )
        ]
        return SeedRecord(
            seed=seed, about=parts, measured=tuple(_policy_of(one, positions) for one in policies)
        )
    except (json.JSONDecodeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path}: not the record of a seed ({error}). scripts/reproduction.py writes them."
        ) from error


def _policy_parts(one: Measured, positions: list[PositionResult]) -> dict[str, Any]:
    outcomes = {name: [getattr(position, name) for position in positions] for name in OUTCOMES}
    return {
        "policy": one.policy,
        "step": one.step,
        "flops": one.flops,
        "mean_length": one.mean_length,
        **{
            name: _encode(values)
            for name, values in outcomes.items()
            if any(value is not None for value in values)
        },
        "ntp_logprob_millinats": [round(1000 * position.ntp_logprob) for position in positions],
    }


def _policy_of(parts: dict[str, Any], positions: list[dict[str, Any]]) -> Measured:
    columns: dict[str, list[Any]] = {name: _decode(parts[name]) for name in OUTCOMES if name in parts}
    columns["ntp_logprob"] = [millinats / 1000 for millinats in parts["ntp_logprob_millinats"]]
    rows = zip(positions, *columns.values(), strict=True)
    return Measured(
        policy=parts["policy"],
        step=parts["step"],
        flops=parts["flops"],
        mean_length=parts["mean_length"],
        results=Results(
            positions=tuple(
                PositionResult(**position, truth="", **dict(zip(columns, values, strict=True)))
                for position, *values in rows
            ),
            policy_path=parts["policy"],
            step=parts["step"],
        ),
    )


def _encode(outcomes: list[bool | None]) -> str:
    return "".join(_CODES[outcome] for outcome in outcomes)


def _decode(codes: str) -> list[bool | None]:
    return [_OUTCOME_OF[code] for code in codes]


def _dump(value: object) -> str:
    """Write JSON with each record of a list on its own line, and a list of numbers on one line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return (
            "[\n"
            + ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in value)
            + "\n]"
        )
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
