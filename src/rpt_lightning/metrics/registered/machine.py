"""Metrics of speed, memory and cost, and of the run's restarts and servers."""

from __future__ import annotations

from rpt_lightning.metrics.metric import Reduction, Section, row

MAX = Reduction.MAX
MIN = Reduction.MIN
SAME = Reduction.SAME
SUM = Reduction.SUM

SECTION = Section(
    title="Speed, memory, cost",
    columns=("meaning", "unit", "watch_for"),
    rows=(
        row(
            {"perf/tokens_per_s": SAME},
            meaning="sampled tokens and trained completion tokens, divided by `time/step_s`",
            unit="tokens/s",
        ),
        row(
            {"perf/rollout_tokens_per_s": SAME},
            meaning=(
                "sampled tokens divided by `time/rollout_s` (with `rollout.max_staleness`, by "
                "`time/generation_s`)"
            ),
            unit="tokens/s",
            watch_for="falls: completions are long, or servers are lost",
        ),
        row(
            {"perf/live_groups_per_s": SAME},
            meaning="`train/groups` divided by `time/step_s`; this is our measure of efficiency",
            unit="groups/s",
        ),
        row(
            {"perf/device_tokens_per_s": SAME},
            meaning="`cost/tokens` divided by `cost/time_s` and the number of devices",
            unit="tokens/s",
        ),
        row(
            {"perf/mfu": SAME},
            meaning=(
                "fraction of a device's peak FLOP/s that training reaches: `cost/train_flops` divided by "
                "the seconds of the forward, backward and optimizer phases, by the number of devices and "
                "by the peak. `metrics/device_peaks.py` lists the dense bf16 peaks of some GPUs. "
                "`--machine.peak_flops_per_device` sets a different peak. Without a known peak, the metric "
                "is left out."
            ),
            unit="fraction",
        ),
        row(
            {"perf/host_memory_gib": MAX},
            meaning=(
                "resident memory of the trainer's process at the end of the step, on the rank with the "
                "most; engines in other processes are not included"
            ),
            unit="GiB",
            watch_for="grows from step to step",
        ),
        row(
            {"perf/gpu_memory_gib": MAX},
            meaning=(
                "peak memory that PyTorch reserved during the step, on the rank with the most (GPUs only)"
            ),
            unit="GiB",
            watch_for="near the device's memory",
        ),
        row(
            {"cost/scored_tokens": SUM},
            meaning=(
                "tokens that passed through the policy without a gradient, for task selection, the "
                "comparison of log-probs, old log-probs and dense rewards"
            ),
            unit="tokens",
        ),
        row(
            {"cost/trained_tokens": SUM},
            meaning="trained tokens, with shared prefixes counted once",
            unit="tokens",
        ),
        row(
            {"cost/tokens": SUM},
            meaning=(
                "all tokens that passed through the model: `cost/scored_tokens`, "
                "`cost/trained_tokens`, `rollout/prefill_tokens` and `rollout/tokens`"
            ),
            unit="tokens",
        ),
        row(
            {"cost/train_flops": SUM},
            meaning="the model's FLOPs in training",
            unit="FLOPs",
        ),
        row(
            {"cost/flops": SUM},
            meaning=(
                'the model\'s FLOPs on all tokens (docs/decisions.md, "What a run costs"); `budget.by` '
                "and `rpt scaling` add them up"
            ),
            unit="FLOPs",
        ),
        row(
            {"cost/time_s": MAX},
            meaning="seconds of the step including rollouts, without validation and checkpoints",
            unit="s",
        ),
        row(
            {"run/restarts": SAME},
            meaning="number of times the run was restarted",
            unit="restarts",
            watch_for="grows although you did not restart the run: the log says why each start ended",
        ),
        row(
            {"run/usable_servers": MIN, "run/lost_servers": MAX},
            meaning=(
                "number of vLLM servers that can be used (lowest count of any rank), and number of times "
                "that one was lost since this start of the run (highest count of any rank); only with "
                "`VLLMServerEngine`"
            ),
            unit="servers, times",
            watch_for="fewer than you configured: the log of `rpt serve` says why",
        ),
    ),
)
