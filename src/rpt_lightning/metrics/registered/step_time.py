"""The phases of a step, in seconds. Each phase of `StepClock` needs a row here."""

from __future__ import annotations

from rpt_lightning.metrics.metric import Reduction, Section, row

MAX = Reduction.MAX

SECTION = Section(
    title="Time of a step",
    columns=("meaning", "watch_for"),
    before=(
        "The phases of a step in seconds, in the order in which they happen. (With "
        "`rollout.max_staleness` the wait for rollouts comes first.) They do not overlap, except with "
        "generation in the background. The rest of `time/step_s` is our own arithmetic (advantages, "
        "metrics), and in the first step also the start of the engine."
    ),
    rows=(
        row(
            {"time/between_steps_s": MAX},
            meaning=(
                "time since the end of the previous step: loggers, checkpoints, the next tasks, and a "
                "validation if there was one"
            ),
            unit="s",
            watch_for="large without a validation: storage or a logger is slow",
        ),
        row(
            {"time/selection_s": MAX},
            meaning=(
                "the policy's scores of the step's tasks and of those drawn instead (only with "
                "`rollout.selection`; the draws of dynamic sampling are part of `time/rollout_s`)"
            ),
            unit="s",
        ),
        row(
            {"time/sync_s": MAX},
            meaning="loading weights into the engine and verifying them",
            unit="s",
        ),
        row(
            {"time/rollout_s": MAX},
            meaning=(
                "prompts, generation, predictions and rewards, including further rounds of dynamic "
                "sampling; with `rollout.max_staleness` only the time spent waiting for them"
            ),
            unit="s",
            watch_for="with `rollout.max_staleness`, well above 0: generation takes longer than training",
        ),
        row(
            {"time/generation_s": MAX},
            meaning=(
                "time that this step's rollouts took in the background (only with `rollout.max_staleness`)"
            ),
            unit="s",
        ),
        row(
            {"time/logprob_check_s": MAX},
            meaning="the policy's log-probs of a few completions, compared with the engine's",
            unit="s",
        ),
        row(
            {"time/old_logprobs_s": MAX},
            meaning="log-probs before the update (only with several optimizer steps per batch)",
            unit="s",
        ),
        row(
            {"time/pack_s": MAX},
            meaning="packing sequences into trees",
            unit="s",
        ),
        row(
            {"time/forward_backward_s": MAX},
            meaning="all micro-batches",
            unit="s",
        ),
        row(
            {"time/optimizer_s": MAX},
            meaning="gradient clip and optimizer step",
            unit="s",
        ),
        row(
            {"time/log_s": MAX},
            meaning="passing metrics to Lightning",
            unit="s",
        ),
        row(
            {"time/train_s": MAX},
            meaning="everything from the end of the log-prob check to the end of the step",
            unit="s",
        ),
        row(
            {"time/step_s": MAX},
            meaning=(
                "from weight sync to the end of training; with `time/between_steps_s` it adds up to the time "
                "from step to step"
            ),
            unit="s",
        ),
    ),
    after=(
        "Next-token training has four of these phases: packing, forward and backward, optimizer, and log."
    ),
)
