"""Metrics that compare the engine with the policy, and the policy's entropy."""

from __future__ import annotations

from rpt_lightning.metrics.metric import Reduction, Section, row

MAX = Reduction.MAX
SAME = Reduction.SAME

SECTION = Section(
    title="Engine and policy",
    columns=("meaning", "unit", "normal", "watch_for"),
    rows=(
        row(
            {"sync/logprob_diff_mean": MAX, "sync/logprob_diff_median": MAX},
            meaning=(
                "absolute difference between the log-probs of engine and policy, over the tokens of a "
                "few completions of the current weights (mean and median)"
            ),
            unit="nats",
            normal="mean: fp32 7e-6, bf16 0.045 (SmolLM2-135M)",
            watch_for=(
                "If the mean exceeds 1e-4 or the median 8e-5 (bf16: 0.12 and 0.1), times "
                "`rollout.check.logprob_tolerance`, more completions are compared. The run ends if "
                "they confirm the difference. In this check, a token counts in the mean for at most 8 "
                "times the limit. If the value rises steadily, find out why before it reaches the "
                "limit."
            ),
        ),
        row(
            {"sync/logprob_diff_p99": MAX, "sync/logprob_diff_max": MAX},
            meaning="99th percentile and maximum of this absolute difference",
            unit="nats",
            normal="fp32: 3e-5, 5e-5; bf16: 0.26, 0.37",
            watch_for=(
                "In bf16, rare tokens may differ a lot (in a healthy run, one of 56 by 1.1 nats). "
                "Above 5e-4 and 1e-3 (bf16: 0.8 and 3.0), the run warns once."
            ),
        ),
        row(
            {"sync/logprob_outlier_frac": MAX},
            meaning="fraction of the compared tokens that differ by more than 5e-4 nats (bf16: 0.8)",
            unit="fraction",
            normal="0",
            watch_for=(
                "Above 1 % (or above 0.1 % for differences of more than 1e-3, or 3.0 in bf16), by "
                "more than chance explains for that number of tokens, more completions are compared, "
                "as for the mean."
            ),
        ),
        row(
            {"sync/compared_tokens": MAX},
            meaning=(
                "tokens that were compared, on the rank with the most; at most 4,096, drawn from all "
                "of the `rollout.check.verify_sequences` completions"
            ),
            unit="tokens",
            watch_for="few: single tokens dominate the mean and the 99th percentile",
        ),
        row(
            {"sync/closer_looks": MAX},
            meaning="number of times since the process began that more completions had to be compared",
            normal="0",
            watch_for=(
                "grows: the differences between engine and policy are close to the limits; read the warning"
            ),
        ),
        row(
            {"sync/sent_bytes": MAX, "sync/full_bytes": MAX},
            meaning=(
                "bytes that the latest weight sync sent to a server that held the previous version, "
                "and bytes of the full set of weights that was written in addition or instead (only "
                "with `SharedFolderTransport`, from the first rank)"
            ),
            unit="bytes",
            normal="sent: a few per cent of the weights; full: 0 in nine of ten versions",
            watch_for=(
                "as large as the weights in every step: too much changes for patches (a large "
                "learning rate, or fp32), so `transport.full_every 1` saves the extra copies "
                "(docs/weight-sync.md)"
            ),
        ),
        row(
            {"sync/changed_frac": MAX},
            meaning=(
                "fraction of the weights whose bits, in the engine's dtype, the latest weight sync "
                "changed (only with `SharedFolderTransport`); 1 in the first sync"
            ),
            unit="fraction",
            normal="bf16, learning rate 1e-6: 0.01 to 0.05; fp32: near 1",
            watch_for=(
                "0: the optimizer does not move the weights, or moves them too little for the engine's dtype"
            ),
        ),
        row(
            {"correction/raw_mean": SAME, "correction/raw_max": SAME},
            meaning=(
                "probability under the policy before the step divided by the engine's probability, on "
                "trained tokens (mean and maximum)"
            ),
            unit="ratio",
            normal="the mean is near 1; in fp32 the maximum is too",
            watch_for="a mean far from 1: engine and policy compute different things, or rollouts are stale",
        ),
        row(
            {"correction/weight_mean": SAME},
            meaning="mean of this ratio after `model.correction_cap` (used only with `model.correction`)",
            unit="ratio",
            normal="near 1",
        ),
        row(
            {"correction/above_cap_frac": SAME},
            meaning=(
                "fraction of tokens above the cap; with `model.correction_level` sequence, of tokens "
                "in completions above it"
            ),
            unit="fraction",
            normal="near 0",
            watch_for="a few per cent or more",
        ),
        row(
            {"correction/below_floor_frac": SAME},
            meaning=(
                "fraction of tokens below `model.correction_floor`, or in completions below it; 0 "
                "without a floor"
            ),
            unit="fraction",
            normal="near 0",
            watch_for="a few per cent or more",
        ),
        row(
            {"policy/entropy": SAME},
            meaning=(
                "entropy of the policy at the sampling temperature, over trained tokens; 0 if none was "
                "trained"
            ),
            unit="nats per token",
            normal="falls slowly",
            watch_for="below 0.02: the run warns; rises steeply: the policy degenerates",
        ),
    ),
)
