"""The phases of a step, in seconds. Each phase of `StepClock` needs a row here."""

from __future__ import annotations

from rpt_lightning.metrics.metric import Reduction, Section, row

MAX = Reduction.MAX

SECTION = Section(
    title="Time of a step",
    columns=("meaning", "watch_for"),
    before=(
        "The table lists the phases of a step in seconds, in the order in which they happen. With "
        "`rollout.max_staleness`, the wait for rollouts comes first. Phases do not overlap, except with "
        "generation in the background. The rest of `time/step_s` is spent on advantages and metrics, and "
        "in the first step also on starting the engine."
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
                "scoring the step's tasks, and those drawn to replace them, with the policy (only with "
                "`rollout.selection`; tasks drawn by dynamic sampling are scored in `time/rollout_s`)"
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
                "making prompts, generating, reading predictions and computing rewards, including further "
                "rounds of dynamic sampling; with `rollout.max_staleness` only the wait for the rollouts"
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
            meaning="comparing the engine's log-probs of a few completions with the policy's",
            unit="s",
        ),
        row(
            {"time/old_logprobs_s": MAX},
            meaning=("computing log-probs before the update (only with several optimizer steps per batch)"),
            unit="s",
        ),
        row(
            {"time/pack_s": MAX},
            meaning="packing sequences into trees",
            unit="s",
        ),
        row(
            {"time/forward_backward_s": MAX},
            meaning="forward and backward passes of all micro-batches",
            unit="s",
        ),
        row(
            {"time/optimizer_s": MAX},
            meaning="clipping the gradient and stepping the optimizer",
            unit="s",
        ),
        row(
            {"time/log_s": MAX},
            meaning="passing metrics to Lightning",
            unit="s",
        ),
        row(
            {"time/train_s": MAX},
            meaning="everything between the end of the log-prob check and the end of the step",
            unit="s",
        ),
        row(
            {"time/step_s": MAX},
            meaning=(
                "the whole step, from task selection or weight sync to the end of training; with "
                "`time/between_steps_s` it adds up to the time from the end of one step to the "
                "end of the next"
            ),
            unit="s",
        ),
    ),
    after=(
        "Next-token training has four of these phases: packing, forward and backward, optimizer, and log."
    ),
)
