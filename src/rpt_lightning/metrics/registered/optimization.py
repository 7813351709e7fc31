"""Metrics of the loss and the optimizer step."""

from __future__ import annotations

from rpt_lightning.metrics.metric import Reduction, Section, row

MAX = Reduction.MAX
SAME = Reduction.SAME
SUM = Reduction.SUM

SECTION = Section(
    title="Training",
    columns=("meaning", "unit", "normal", "watch_for"),
    rows=(
        row(
            {"loss/total": SUM},
            meaning="the loss",
            unit="RPT: none, since the loss scales with the advantages; next-token training: nats per token",
            normal="RPT: near 0 when on-policy, plus `model.ntp_weight` times `loss/ntp`; "
            "next-token training: falls",
            watch_for="not finite: the step is skipped",
        ),
        row(
            {"loss/ntp": SUM},
            meaning="mean next-token loss of the step's context tokens, at temperature 1 "
            "(`model.ntp_weight` above 0)",
            unit="nats per token",
            normal="falls slowly, but not below the entropy of the text",
            watch_for="rises: the policy gradient makes plain next-token prediction worse",
        ),
        row(
            {"loss/ratio_mean": SAME, "loss/ratio_max": SAME},
            meaning=(
                "probability after the optimizer steps of this batch divided by the probability "
                "before them, on trained tokens (mean and maximum)"
            ),
            unit="ratio",
            normal="exactly 1 with one optimizer step per batch",
            watch_for="far from 1 with several: the learning rate is too high",
        ),
        row(
            {"loss/ratio_after_clip_mean": SAME},
            meaning="mean of this ratio after PPO's clip",
            unit="ratio",
            normal="exactly 1 with one optimizer step per batch",
        ),
        row(
            {"loss/ratio_clipped_frac": SAME},
            meaning="fraction of tokens whose loss the clip changed",
            unit="fraction",
            normal="0 with one optimizer step per batch; small with several",
            watch_for="large",
        ),
        row(
            {"loss/approx_kl": SAME},
            meaning="estimate of the KL divergence from the policy before this batch",
            unit="nats per token",
            normal="0 with one optimizer step per batch",
            watch_for="rises steadily",
        ),
        row(
            {"optim/grad_norm": SAME},
            meaning="norm of the gradient before the clip; 0 if no group had a gradient",
            normal="below or around `model.gradient_clip`",
            watch_for=(
                "always far above `model.gradient_clip`: every step is clipped; not finite: the step "
                "is skipped"
            ),
        ),
        row(
            {"optim/lr": SAME},
            meaning="learning rate of the step",
        ),
        row(
            {"optim/skipped_steps": SAME},
            meaning=(
                "number of steps so far without an update, because the loss or the gradient was not finite"
            ),
            unit="steps",
            normal="0",
            watch_for="grows; the run ends after `model.max_skipped_steps` (3) skipped steps in a row",
        ),
        row(
            {"train/groups": SUM},
            meaning="groups that the policy trained on",
            unit="groups",
            normal="all groups with a gradient",
            watch_for="0: nothing was learned",
        ),
        row(
            {"train/live_completions": SUM},
            meaning="completions that the last optimizer step trained on",
            unit="completions",
        ),
        row(
            {"train/completion_tokens": SUM},
            meaning="tokens of the trained completions",
            unit="tokens",
        ),
        row(
            {"train/target_tokens": SUM},
            meaning="tokens that entered the loss (next-token training only)",
            unit="tokens",
        ),
        row(
            {"train/ntp_tokens": SAME},
            meaning="context tokens that entered `loss/ntp`; each position of a document counts once",
            unit="tokens",
        ),
        row(
            {"train/packed_tokens": SUM},
            meaning="tokens fed to the model for training, with shared prefixes counted once",
            unit="tokens",
        ),
        row(
            {"train/rank_imbalance": SAME},
            meaning=(
                "`train/packed_tokens` of the busiest rank divided by the mean over ranks; the other "
                "ranks wait for the busiest"
            ),
            unit="ratio",
            normal="1 on one rank, and near 1 if ranks have several documents each",
            watch_for="large: there are too few groups with a gradient for so many ranks",
        ),
        row(
            {"train/plain_tokens": SUM},
            meaning="tokens that would be fed if every completion came with its whole prompt",
            unit="tokens",
            normal="more than `train/packed_tokens`",
            watch_for="equal to `train/packed_tokens`: nothing is shared; the run says at its start why",
        ),
        row(
            {"train/micro_batches": MAX},
            meaning="forward and backward passes of the optimizer step, on the rank with the most",
            unit="passes",
            watch_for=(
                "many passes of few tokens: a larger `model.micro_batch_tokens` is faster if memory allows it"
            ),
        ),
    ),
)
