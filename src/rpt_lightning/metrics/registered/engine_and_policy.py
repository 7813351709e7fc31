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
                "absolute difference between the engine's and the policy's log-probs, over the tokens of "
                "a few completions generated with the current weights (mean and median)"
            ),
            unit="nats",
            normal="mean: fp32 7e-6, bf16 0.045 (SmolLM2-135M)",
            watch_for=(
                "The limit of the mean is 1e-4 and that of the median is 8e-5 (bf16: 0.12 and 0.1), each "
                "multiplied by `rollout.check.logprob_tolerance`. If either is exceeded, more completions "
                "are compared, and the run ends if they confirm the difference. In this check, each "
                "token's difference is capped at 8 times the limit of the mean. If the value rises "
                "steadily, find out why before it reaches the limit."
            ),
        ),
        row(
            {"sync/logprob_diff_p99": MAX, "sync/logprob_diff_max": MAX},
            meaning="99th percentile and maximum of the same differences",
            unit="nats",
            normal="fp32: 3e-5, 5e-5; bf16: 0.26, 0.37",
            watch_for=(
                "In bf16, rare tokens may differ a lot (in a healthy run, one of 56 by 1.1 nats). If the "
                "percentile exceeds 5e-4 or the maximum 1e-3 (bf16: 0.8 and 3.0), the run warns once."
            ),
        ),
        row(
            {"sync/logprob_outlier_frac": MAX},
            meaning="fraction of the compared tokens that differ by more than 5e-4 nats (bf16: 0.8)",
            unit="fraction",
            normal="0",
            watch_for=(
                "More completions are compared, as for the mean, if the fraction is above 1 % by more "
                "than chance explains for that number of tokens. The same applies if more than 0.1 % of "
                "the tokens differ by more than 1e-3 nats (bf16: 3.0)."
            ),
        ),
        row(
            {"sync/compared_tokens": MAX},
            meaning=(
                "number of tokens that were compared, on the rank with the most; at most 4,096 tokens are "
                "drawn from all `rollout.check.verify_sequences` completions"
            ),
            unit="tokens",
            watch_for="few: single tokens dominate the mean and the 99th percentile",
        ),
        row(
            {"sync/closer_looks": MAX},
            meaning="number of times since the process started that more completions had to be compared",
            normal="0",
            watch_for=(
                "grows: the differences between engine and policy are close to the limits; read the warning"
            ),
        ),
        row(
            {"sync/sent_bytes": MAX, "sync/full_bytes": MAX},
            meaning=(
                "bytes that the latest weight sync sent to a server that held the previous version; and "
                "bytes of the full set of weights, if the sync wrote one in addition or instead, else 0 "
                "(only with `SharedFolderTransport`, from the first rank)"
            ),
            unit="bytes",
            normal="sent: a few per cent of the weights; full: 0 in nine of ten versions",
            watch_for=(
                "`sent_bytes` equals the size of the weights in every step: too many weights change to "
                "send only the changes (a large learning rate, or fp32); "
                "`rollout.engine.transport.full_every` 1 then saves the extra copies "
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
                "probability under the policy at the start of the step divided by the engine's "
                "probability, on trained tokens (mean and maximum)"
            ),
            unit="ratio",
            normal="the mean is near 1; in fp32 the maximum is too",
            watch_for=(
                "a mean far from 1: engine and policy compute different probabilities, or rollouts are stale"
            ),
        ),
        row(
            {"correction/weight_mean": SAME},
            meaning=(
                "mean weight of the trained tokens, which is this ratio with `model.correction_cap` applied "
                "(used only with `model.correction`)"
            ),
            unit="ratio",
            normal="near 1",
        ),
        row(
            {"correction/above_cap_frac": SAME},
            meaning=(
                "fraction of tokens whose ratio is above the cap; if `model.correction_level` is "
                "`sequence`, fraction of tokens in completions whose ratio is above it"
            ),
            unit="fraction",
            normal="near 0",
            watch_for="a few per cent or more",
        ),
        row(
            {"correction/below_floor_frac": SAME},
            meaning=("the same for ratios below `model.correction_floor`; 0 without a floor"),
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
