"""Shows a run to people: one line for each step, samples, and the results of every validation.

Each callback has one side effect.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from rpt_lightning.compat.lightning import DescribedProgressBar, batch_index, callbacks_of
from rpt_lightning.flag_bounds import check_number
from rpt_lightning.metrics.difficulty_bands import BANDS
from rpt_lightning.policy.flops import model_size
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.records.results import Results, write_results
from rpt_lightning.records.rollout_samples import RolloutSample, samples_of, write_samples
from rpt_lightning.records.run_folder import ROLLOUT_FOLDER, STEP_LOG, VALIDATION_FOLDER
from rpt_lightning.training.callbacks.budget import Budget
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.validation.position_records import ntp_accuracy, reasoning_accuracy
from rpt_lightning.types import RolloutGroup, TrainBatch

_CONTEXT_TOKENS = 200  # tokens shown from the end of a sample's context


class StepLog(Callback):
    """Logs one line for each step.

    All metrics go as JSON to the run folder's ``steps.jsonl``. The important ones appear on the screen with
    the time left.
    """

    def __init__(self) -> None:
        self._start_time = 0.0
        self._start_step = 0
        self.num_steps = 0  # steps done by this process
        # The names of all metrics so far. Their order gives a metric the same place in every line.
        self._names: dict[str, None] = {}

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_time, self._start_step = time.perf_counter(), trainer.global_step
        path = Path(trainer.default_root_dir) / STEP_LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            # The steps after the checkpoint are about to be repeated.
            kept = [line for line, step in _logged_steps(path) if step <= trainer.global_step]
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(path)

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.num_steps = trainer.global_step - self._start_step
        assert isinstance(pl_module, PolicyModule)
        logged = pl_module.step_metrics
        self._names |= dict.fromkeys(logged)
        metrics = {name: logged[name] for name in self._names if name in logged}
        path = Path(trainer.default_root_dir) / STEP_LOG
        with pl_module.written_or_ended(str(path)), path.open("a") as file:
            file.write(json.dumps({"step": trainer.global_step, "time": time.time(), **metrics}) + "\n")
        print(self._line(trainer, metrics), flush=True)

    def _line(self, trainer: Trainer, metrics: dict[str, float]) -> str:
        elapsed = time.perf_counter() - self._start_time
        seconds_a_step = elapsed / max(1, self.num_steps)
        shown = {
            "loss": ("loss/total", "{:.4f}"),
            "reward": ("reward/mean", "{:.3f}"),
            "live": ("rollout/live_groups_frac", "{:.0%}"),
            "live/s": ("perf/live_groups_per_s", "{:.2f}"),
            "stale": ("rollout/staleness", "{:.0f}"),
            "boxed": ("rollout/boxed_frac", "{:.0%}"),
            "length": ("rollout/length_mean", "{:.1f}"),
            "entropy": ("policy/entropy", "{:.2f}"),
            "grad": ("optim/grad_norm", "{:.3f}"),
            "diff": ("sync/logprob_diff_mean", "{:.4f}"),
            "rollout s": ("time/rollout_s", "{:.1f}"),
            "train s": ("time/train_s", "{:.1f}"),
        }
        parts = [
            f"{label} {form.format(metrics[name])}"
            for label, (name, form) in shown.items()
            if name in metrics
        ]
        budget = next(iter(callbacks_of(trainer, Budget)), None)
        seconds_left = (
            seconds_a_step * (trainer.max_steps - trainer.global_step)
            if trainer.max_steps > 0
            else float("inf")
        )
        total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        # With a budget the number of steps follows from their cost, and --trainer.max_steps is out of reach.
        if budget is not None and budget.share_spent is not None:
            total = f", {budget.share_spent:.0%} of the budget"
            seconds_left = min(seconds_left, budget.seconds_left(elapsed))
        left = f", {seconds_left / 60:.1f} min left" if seconds_left < float("inf") else ""
        return f"step {trainer.global_step}{total}: {', '.join(parts)}, {seconds_a_step:.1f} s a step{left}"


def _logged_steps(path: Path) -> list[tuple[str, int]]:
    """Lines of a step log with their steps.

    A killed run may leave half a line at the end, which is dropped.
    """
    lines = path.read_text().splitlines()
    logged = []
    for number, line in enumerate(lines, start=1):
        try:
            logged.append((line, int(json.loads(line)["step"])))
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{path} line {number}: not a step's metrics ({error!r}), so the run cannot be continued "
                    "in this log; fix or remove the line"
                ) from error
    return logged


class StepProgressBar(DescribedProgressBar):
    """Lightning's Rich progress bar. It counts a run in steps, since its epochs are nominal."""

    def describe_pass(self, current_epoch: int) -> str:
        return f"pass {current_epoch + 1} over the tasks"


class RolloutSamples(Callback):
    """Writes samples of completions every ``every_n_steps`` steps.

    All completions that the step trained on go to ``rollouts/step-N.jsonl``. Groups that dynamic sampling
    replaced are left out. A few completions go as text to the loggers that accept text.

    Args:
        every_n_steps: Number of optimizer steps between samples.
        num_samples: Number of completions that the loggers receive. The file holds all of them.
    """

    def __init__(self, every_n_steps: int = 10, num_samples: int = 4) -> None:
        if every_n_steps < 1:
            raise ValueError(f"samples.every_n_steps={every_n_steps}: give 1 (every step) or more")
        check_number("samples.num_samples", num_samples, least=0, hint="; 0 shows loggers none")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self._token_bytes: TokenBytes | None = None

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, (TensorBoardLogger, WandbLogger)):
                rank_zero_info(
                    f"samples: {type(logger).__name__} accepts no text; completions go only to "
                    f"{ROLLOUT_FOLDER}/"
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rollouts: TrainBatch | None = getattr(batch, "rollouts", None)
        # Lightning's batch_idx restarts with each pass over the tasks.
        if rollouts is None or batch_index(trainer) % self.every_n_steps:
            return
        assert isinstance(pl_module, PolicyModule)
        groups = [group for share in pl_module.ranks.gather(rollouts.groups) for group in share]
        if trainer.is_global_zero:
            self._write(trainer, pl_module, groups)

    def _write(self, trainer: Trainer, pl_module: PolicyModule, groups: Sequence[RolloutGroup]) -> None:
        self._token_bytes = self._token_bytes or TokenBytes(pl_module.tokenizer)
        samples = [
            samples_of(
                group,
                context=str(pl_module.tokenizer.decode(list(group.task.context_ids[-_CONTEXT_TOKENS:]))),
                token_bytes=self._token_bytes,
            )
            for group in groups
        ]
        path = Path(trainer.default_root_dir) / ROLLOUT_FOLDER / f"step-{trainer.global_step:06d}.jsonl"
        with pl_module.written_or_ended(str(path)):
            write_samples(itertools.chain.from_iterable(samples), path)
        self._show([group_samples[0] for group_samples in samples[: self.num_samples]], trainer)

    def _show(self, samples: list[RolloutSample], trainer: Trainer) -> None:
        # The numbers of each token are for the report. People read the texts.
        rows = [
            {name: value for name, value in asdict(sample).items() if name not in ("tokens", "logprobs")}
            for sample in samples
        ]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for number, row in enumerate(rows):
                    logger.experiment.add_text(f"sample/{number}", sample_text(row), trainer.global_step)
            elif isinstance(logger, WandbLogger) and rows:
                data = [[repr(value) for value in row.values()] for row in rows]
                logger.log_text("samples", columns=list(rows[0]), data=data, step=trainer.global_step)


def sample_text(row: Mapping[str, object]) -> str:
    """A sample as Markdown, as TensorBoard renders it.

    Values are blocks of code, which nothing within a line can close. So no completion becomes a link or an
    image.
    """
    return "\n\n".join(f"**{name}**\n\n    {value!r}" for name, value in row.items())


class ValidationResults(Callback):
    """Writes one record for each position to ``validation/step-N.jsonl`` at every validation.

    With these records, any two policies can be compared position by position.
    """

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        if trainer.sanity_checking or not pl_module.results:
            return
        results = Results(
            positions=tuple(pl_module.results),
            policy_path=pl_module.policy.path,
            step=pl_module.policy_version,
            ckpt_path=pl_module.evaluated_ckpt_path,
            model_size=model_size(pl_module.policy.model),
            temperature=_sampling_temperature(trainer),
        )
        print(validation_text(results), flush=True)
        write_results(
            results, Path(trainer.default_root_dir) / VALIDATION_FOLDER / f"step-{results.step:06d}.jsonl"
        )


def _sampling_temperature(trainer: Trainer) -> float | None:
    """Temperature of the further completions of each position. None if there are none."""
    rollouts = callbacks_of(trainer, RolloutCallback)
    return next((callback.sampling.temperature for callback in rollouts if callback.evaluation.samples), None)


def validation_text(results: Results) -> str:
    """Accuracy by reasoning and without, for each band of difficulty.

    Both are at the same positions, with count, 95 % interval and ceiling.
    """
    ntp = ntp_accuracy(results.positions)
    reasoning = reasoning_accuracy(results.positions)
    lines = [f"held-out accuracy of {results.ckpt_path or results.policy_path} at step {results.step}:"]
    for band in BANDS:
        count = int(ntp[f"{band}/num_positions"])
        if not count:
            continue
        by_reasoning = "not measured" if reasoning is None else _accuracy_text(reasoning, band)
        unanswerable = count - int(ntp[f"{band}/num_answerable"])
        lines.append(
            f"  {band:<6} by reasoning {by_reasoning}, without {_accuracy_text(ntp, band)}, "
            f"{count:,} positions, {unanswerable:,} unanswerable: ceiling {ntp[f'{band}/ceiling']:.1%}"
        )
    return "\n".join(lines)


def _accuracy_text(metrics: dict[str, float], band: str) -> str:
    return (
        f"{metrics[f'{band}/accuracy']:.1%} "
        f"[{metrics[f'{band}/accuracy_low']:.1%}, {metrics[f'{band}/accuracy_high']:.1%}]"
    )
