"""Metrics of a validation on held-out positions or questions."""

from __future__ import annotations

from rpt_lightning.metrics import difficulty_bands as bands
from rpt_lightning.metrics.metric import Reduction, Section, row

SAME = Reduction.SAME
BANDS = ("all", *bands.BANDS)

SECTION = Section(
    title="Validation",
    columns=("meaning", "unit", "watch_for"),
    before=(
        "BAND is `all`, `easy`, `medium` or `hard` (proxy entropy above 0.5, 1.0, 1.5 nats; a hard "
        "position is also a medium and an easy one). NTP is next-token prediction without reasoning, at "
        "the same positions."
    ),
    rows=(
        row(
            {
                "val/ntp/{band}/accuracy": SAME,
                "val/ntp/{band}/accuracy_low": SAME,
                "val/ntp/{band}/accuracy_high": SAME,
            },
            meaning="accuracy without reasoning, and its 95 % interval",
            unit="fraction",
            bands=BANDS,
        ),
        row(
            {
                "val/ntp/{band}/num_positions": SAME,
                "val/ntp/{band}/num_answerable": SAME,
                "val/ntp/{band}/ceiling": SAME,
            },
            meaning=(
                "positions; those whose true token fits into a box; and their fraction, which limits the "
                "accuracy with reasoning"
            ),
            unit="positions, fraction",
            bands=BANDS,
        ),
        row(
            {"val/ntp/loss": SAME},
            meaning="negative log-prob of the true token without reasoning",
            unit="nats",
            watch_for="rises a lot: the policy forgets plain next-token prediction",
        ),
        row(
            {
                "val/reasoning/{band}/accuracy": SAME,
                "val/reasoning/{band}/accuracy_low": SAME,
                "val/reasoning/{band}/accuracy_high": SAME,
            },
            meaning="accuracy with reasoning, and its 95 % interval (treating positions as independent)",
            unit="fraction",
            watch_for="compare it with NTP at the same positions",
            bands=BANDS,
        ),
        row(
            {
                "val/reasoning/{band}/num_positions": SAME,
                "val/reasoning/{band}/num_answerable": SAME,
                "val/reasoning/{band}/ceiling": SAME,
            },
            meaning="as for `val/ntp/BAND`",
            unit="positions, fraction",
            bands=BANDS,
        ),
        row(
            {"val/boxed_frac": SAME, "val/truncated_frac": SAME, "val/length_mean": SAME},
            meaning="as `rollout/boxed_frac` and so on, for the greedy completions",
            unit="fraction, fraction, tokens",
        ),
        row(
            {
                "val/answers/accuracy": SAME,
                "val/answers/accuracy_low": SAME,
                "val/answers/accuracy_high": SAME,
            },
            meaning=(
                "accuracy on held-out questions (the mean over a question's completions), and its 95 % "
                "interval"
            ),
            unit="fraction",
        ),
        row(
            {"val/answers/num_questions": SAME},
            meaning="number of questions",
            unit="questions",
        ),
        row(
            {"val/answers/truncated_frac": SAME, "val/answers/unboxed_frac": SAME},
            meaning="fractions of completions that reached the token limit, and that ended without a box",
            unit="fraction",
            watch_for="many truncated: raise the limit before you compare accuracies",
        ),
        row(
            {"val/answers/length_mean": SAME},
            meaning="mean length of completions",
            unit="tokens",
        ),
        row(
            {
                "val/answers/quoted": SAME,
                "val/answers/unreadable": SAME,
                "val/answers/timeouts": SAME,
                "val/answers/check_errors": SAME,
            },
            meaning="as in training",
            unit="answers",
        ),
        row(
            {
                "val/answers/direct_accuracy": SAME,
                "val/answers/direct_accuracy_low": SAME,
                "val/answers/direct_accuracy_high": SAME,
                "val/answers/direct_num_questions": SAME,
            },
            meaning=(
                "accuracy without a thought and its 95 % interval, and the number of questions (only "
                "with `rollout.evaluation.thought_controls`)"
            ),
            unit="fraction, questions",
        ),
    ),
)
