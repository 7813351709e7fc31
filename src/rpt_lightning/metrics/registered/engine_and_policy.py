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
                "difference between the log-probs of engine and policy, on tokens of a few completions of "
                "the current weights"
            ),
            unit="nats",
            normal="mean: fp32 7e-6, bf16 0.045 (SmolLM2-135M)",
            watch_for=(
                "Above 1e-4 and 8e-5 (bf16: 0.12 and 0.1), times `rollout.check.logprob_tolerance`, more "
                "completions are compared. The run ends if they confirm the difference. For this check a "
                "token counts in the mean for at most 8 times the limit. If the value rises steadily, find "
                "out why before it gets there."
            ),
        ),
        row(
            {"sync/logprob_diff_p99": MAX, "sync/logprob_diff_max": MAX},
            meaning="the same difference at the 99th percentile, and the largest",
            unit="nats",
            normal="fp32: 3e-5, 5e-5; bf16: 0.26, 0.37",
            watch_for=(
                "In bf16 rare tokens may be far off (in a healthy run, one of 56 by 1.1 nats). Above 5e-4, "
                "1e-3 (bf16: 0.8, 3.0) the run says so once."
            ),
        ),
        row(
            {"sync/logprob_outlier_frac": MAX},
            meaning="share of the compared tokens that differ by more than 5e-4 (bf16: 0.8) nats",
            unit="fraction",
            normal="0",
            watch_for=(
                "Well above 1 % (or 0.1 % above 1e-3; bf16: 3.0), by more than chance explains for that "
                "number of tokens: as for the mean."
            ),
        ),
        row(
            {"sync/compared_tokens": MAX},
            meaning=(
                "tokens that were compared, on the rank with the most; at most 4,096, drawn from all of "
                "`rollout.check.verify_sequences` completions"
            ),
            unit="tokens",
            watch_for="few: single tokens dominate mean and p99",
        ),
        row(
            {"sync/closer_looks": MAX},
            meaning="how often more completions had to be compared since the process began",
            normal="0",
            watch_for="it grows: engine and policy are close to the limits; read the warning",
        ),
        row(
            {"sync/sent_bytes": MAX, "sync/full_bytes": MAX},
            meaning=(
                "what the latest weight sync sent to a server that held the version before, and the full set "
                "of weights that was written besides or instead (only with `SharedFolderTransport`, from the "
                "first rank)"
            ),
            unit="bytes",
            normal="sent: a few percent of the weights; full: 0 in nine of ten versions",
            watch_for=(
                "as large as the weights in every step: too much changes for patches (a large learning rate, "
                "or fp32), so `transport.full_every 1` saves the copies (docs/weight-sync.md)"
            ),
        ),
        row(
            {"sync/changed_frac": MAX},
            meaning=(
                "share of the weights, in the engine's dtype, whose bits the latest weight sync changed (as "
                "above); 1 in the first one"
            ),
            unit="fraction",
            normal="bf16, learning rate 1e-6: 0.01 to 0.05; fp32: near 1",
            watch_for="0: the optimizer does not move the weights, or too little for the engine's dtype",
        ),
        row(
            {"correction/raw_mean": SAME, "correction/raw_max": SAME},
            meaning=(
                "probability under the policy before the step, divided by the engine's, on trained tokens"
            ),
            unit="ratio",
            normal="mean near 1; in fp32 both",
            watch_for="a mean far from 1: engine and policy compute different things, or rollouts are stale",
        ),
        row(
            {"correction/weight_mean": SAME},
            meaning="the same after `model.correction_cap`; used only with `model.correction`",
            unit="ratio",
            normal="near 1",
        ),
        row(
            {"correction/above_cap_frac": SAME},
            meaning=(
                "tokens above the cap; with `model.correction_level` sequence, tokens of completions above it"
            ),
            unit="share",
            normal="near 0",
            watch_for="some per cent",
        ),
        row(
            {"correction/below_floor_frac": SAME},
            meaning="the same below `model.correction_floor`; 0 without one",
            unit="share",
            normal="near 0",
            watch_for="some per cent",
        ),
        row(
            {"policy/entropy": SAME},
            meaning=(
                "entropy of the policy at the sampling temperature, over trained tokens; 0 if none was "
                "trained"
            ),
            unit="nats per token",
            normal="falls slowly",
            watch_for="a warning below 0.02; a steep rise: the policy degenerates",
        ),
    ),
)
