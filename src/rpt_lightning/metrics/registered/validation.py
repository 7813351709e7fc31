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
        "BAND is `all`, `easy`, `medium` or `hard`. Easy, medium and hard positions have a proxy entropy "
        "above 0.5, 1.0 and 1.5 nats, so a hard position is also a medium and an easy one. NTP is "
        "next-token prediction without reasoning, at the same positions."
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
                "number of positions, number of those whose true token can be written in a box, and the "
                "fraction of the latter, which limits the accuracy with reasoning"
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
            watch_for="compare it with the accuracy without reasoning at the same positions",
            bands=BANDS,
        ),
        row(
            {
                "val/reasoning/{band}/num_positions": SAME,
                "val/reasoning/{band}/num_answerable": SAME,
                "val/reasoning/{band}/ceiling": SAME,
            },
            meaning="the same as for `val/ntp/BAND`",
            unit="positions, fraction",
            bands=BANDS,
        ),
        row(
            {"val/boxed_frac": SAME, "val/truncated_frac": SAME, "val/length_mean": SAME},
            meaning=(
                "the same as `rollout/boxed_frac`, `rollout/truncated_frac` and `rollout/length_mean`, but "
                "for the greedy completions"
            ),
            unit="fraction, fraction, tokens",
        ),
        row(
            {
                "val/answers/accuracy": SAME,
                "val/answers/accuracy_low": SAME,
                "val/answers/accuracy_high": SAME,
            },
            meaning=(
                "accuracy on held-out questions, and its 95 % interval; each question counts with the mean "
                "over its completions"
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
            meaning=(
                "fraction of completions that reached the token limit, and fraction that ended without a box"
            ),
            unit="fraction",
            watch_for="many truncated: raise the token limit before you compare accuracies",
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
            meaning="the same as `answers/quoted` and so on in training",
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
