"""Every validation on questions writes its records to ``answers/step-N.jsonl`` and logs its accuracy.

There is one record for each question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rpt_lightning.compat.lightning import callbacks_of
from rpt_lightning.metrics.interval import clustered_interval, wilson_interval
from rpt_lightning.objectives.rewards.answer import METRICS
from rpt_lightning.records.question_results import QuestionResult, QuestionResults, write_question_results
from rpt_lightning.records.run_folder import ANSWER_FOLDER
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.modules.policy_module import PolicyModule


class AnswerResults(Callback):
    """Collects and logs the answers of a validation.

    The rollout callback answers the questions of a batch when it begins. They are read when it ends.
    """

    def __init__(self) -> None:
        self.results: list[QuestionResult] = []  # of this rank during a pass, then of all ranks

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch.records == "questions":
            self.results += batch.answers

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        of_ranks = pl_module.ranks.gather(self.results)
        self.results = list({row.question_id: row for rows in of_ranks for row in rows}.values())
        for name, value in answer_metrics(self.results).items():
            # Every rank already has the same value. sync_dist only silences Lightning's request for it.
            pl_module.log(name, value, prog_bar=name == "val/answers/accuracy", sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        if trainer.sanity_checking or not self.results:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        (rollout,) = callbacks_of(trainer, RolloutCallback)
        results = QuestionResults(
            questions=tuple(self.results),
            benchmark=getattr(data, "heldout_name", "held-out questions"),
            policy_path=pl_module.policy.path,
            step=pl_module.policy_version,
            ckpt_path=pl_module.evaluated_ckpt_path,
            temperature=rollout.sampling.temperature if rollout.evaluation.samples else 0.0,
            max_completion_tokens=rollout.sampling.max_completion_tokens,
            seed=rollout.seed,
        )
        if trainer.is_global_zero:
            print(answers_text(results), flush=True)
            write_question_results(
                results, Path(trainer.default_root_dir) / ANSWER_FOLDER / f"step-{results.step:06d}.jsonl"
            )


def answer_metrics(results: Sequence[QuestionResult]) -> dict[str, float]:
    """The metrics of a validation, from records gathered over ranks. Empty if there are no records."""
    if not results:
        return {}
    low, high = clustered_interval([row.right_frac for row in results], samples_each=len(results[0].verdicts))
    verdicts = [verdict for row in results for verdict in row.verdicts]
    metrics = {
        "val/answers/accuracy": fmean(row.right_frac for row in results),
        "val/answers/accuracy_low": low,
        "val/answers/accuracy_high": high,
        "val/answers/num_questions": float(len(results)),
        "val/answers/truncated_frac": verdicts.count("truncated") / len(verdicts),
        "val/answers/unboxed_frac": verdicts.count("unboxed") / len(verdicts),
        "val/answers/length_mean": fmean(length for row in results for length in row.lengths),
    } | {f"val/{name}": float(verdicts.count(verdict)) for name, verdict in METRICS.items()}
    direct = [row.direct_verdict == "right" for row in results if row.direct_verdict is not None]
    if direct:
        low, high = wilson_interval(sum(direct), len(direct))
        metrics |= {
            "val/answers/direct_accuracy": fmean(direct),
            "val/answers/direct_accuracy_low": low,
            "val/answers/direct_accuracy_high": high,
            "val/answers/direct_num_questions": float(len(direct)),
        }
    return metrics


def answers_text(results: QuestionResults) -> str:
    """One line for the screen."""
    metrics = answer_metrics(results.questions)
    drawn = f"{results.num_samples} at temperature {results.temperature}" if results.temperature else "greedy"
    parts = [
        f"{len(results.questions):,} questions ({drawn}): "
        f"{_percent(metrics, 'accuracy')} right after a thought"
    ]
    if "val/answers/direct_accuracy" in metrics:
        parts.append(f"{_percent(metrics, 'direct_accuracy')} without")
    parts.append(f"{metrics['val/answers/truncated_frac']:.1%} truncated")
    return (
        f"{results.benchmark}, {results.ckpt_path or results.policy_path} at step {results.step}: "
        + ", ".join(parts)
    )


def _percent(metrics: dict[str, float], name: str) -> str:
    return (
        f"{metrics[f'val/answers/{name}']:.1%} "
        f"[{metrics[f'val/answers/{name}_low']:.1%}, {metrics[f'val/answers/{name}_high']:.1%}]"
    )
