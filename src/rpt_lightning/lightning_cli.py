"""Lightning's command line with the parts of this project: module, data, rollouts, and one explicit folder a run."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from transformers.utils.logging import disable_progress_bar

from rpt_lightning.training.checkpoint import RunCheckpoint, last_checkpoint
from rpt_lightning.training.module import RPTModule
from rpt_lightning.training.monitors import RolloutSamples, StepLog, StepProgressBar, ValidationResults
from rpt_lightning.training.ntp_module import NTPModule
from rpt_lightning.training.policy_module import PolicyModule
from rpt_lightning.training.rollout_callback import RolloutCallback

# Imported so that configs may name them by their short names.
from rpt_lightning.data.datamodule import TokenTaskDataModule  # isort: skip
from rpt_lightning.data.text_datamodule import TextDataModule  # isort: skip
from rpt_lightning.data.trace_datamodule import TraceDataModule  # isort: skip
from rpt_lightning.rollout.hf_engine import HFEngine  # isort: skip
from rpt_lightning.rollout.scripted_engine import ScriptedEngine  # isort: skip
from rpt_lightning.rollout.vllm_engine import VLLMEngine  # isort: skip

PARTS = (RPTModule, NTPModule, TokenTaskDataModule, TextDataModule, TraceDataModule, HFEngine, ScriptedEngine, VLLMEngine)
CONFIG_FILE = "config.yaml"
_NOISE = ("litlogger", "`weights_only` was not set", "`Trainer(limit_val_batches=1.0)`")


class SaveRunConfig(SaveConfigCallback):
    """The resolved configuration of every start, in the run folder: ``config.yaml``, and ``config-2.yaml`` and so on for resumed starts."""

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path, number = folder / (CONFIG_FILE if stage == "fit" else f"config-{stage}.yaml"), 2
        while stage == "fit" and path.exists():
            path, number = folder / f"config-{number}.yaml", number + 1
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)


class RPTCLI(LightningCLI):
    """``trainer.default_root_dir`` is the run folder: configuration, logs, checkpoints, samples and validation results all lie in it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RolloutCallback, "rollout")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RolloutSamples, "samples")
        parser.link_arguments("seed_everything", "rollout.seed")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        verbs = LightningCLI.subcommands()
        return {verb: verbs[verb] | {"weights_only"} for verb in ("fit", "validate")}  # checkpoints never run code: weights_only is always on

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        folder = config["default_root_dir"]
        if not folder:
            raise ValueError("trainer.default_root_dir is not set: name the run's folder, e.g. --trainer.default_root_dir runs/my-run")
        if config.get("logger") in (None, True):
            config["logger"] = TensorBoardLogger(save_dir=str(Path(folder) / "tensorboard"), name="", version="")
        # Lightning's own checkpoint callback would be added beside ours.
        config["enable_checkpointing"] = True
        self.step_log = StepLog()
        bar = [StepProgressBar()] if config.get("enable_progress_bar") is not False else []
        return super()._instantiate_trainer(config, [*callbacks, *bar, self.step_log, ValidationResults()])

    def fit(self, model: PolicyModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """A run folder holds one run, new or continued; a missing checkpoint is an error, and so is a fit that does no step."""
        folder = Path(self.trainer.default_root_dir)
        if ckpt_path == "last":
            ckpt_path = str(last_checkpoint(folder))
        elif ckpt_path is None and (folder / CONFIG_FILE).exists():
            raise ValueError(
                f"trainer.default_root_dir={folder} holds a run already; continue it with --ckpt_path last, or name another folder with "
                "--trainer.default_root_dir"
            )
        self.trainer.fit(model, ckpt_path=ckpt_path, weights_only=True, **kwargs)
        if self.step_log.num_steps == 0 and not self.trainer.interrupted:
            raise ValueError(
                f"the run did no step: it is at step {self.trainer.global_step} of trainer.max_steps={self.trainer.max_steps} already; "
                "raise trainer.max_steps"
            )

    def validate(self, model: PolicyModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Of the weights that model.policy.path names, or of a checkpoint of them."""
        if ckpt_path == "last":
            ckpt_path = str(last_checkpoint(Path(self.trainer.default_root_dir)))
        self.trainer.validate(model, ckpt_path=ckpt_path, weights_only=True, **kwargs)


def _quieten() -> None:
    """Drops what says nothing about the run: deprecations between libraries, an advertisement, bars of a second."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: not any(text in record.getMessage() for text in _NOISE))
    disable_progress_bar()  # type: ignore[no-untyped-call]


def make_cli(*, run: bool = True, args: list[str] | None = None) -> RPTCLI:
    """The command line, run or (``run=False``, without a verb in ``args``) only built."""
    return RPTCLI(
        model_class=PolicyModule,
        subclass_mode_model=True,
        datamodule_class=LightningDataModule,
        subclass_mode_data=True,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        trainer_defaults={"logger": None, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_model_summary": False},
        parser_kwargs={"prog": "rpt"} if run else {},
        run=run,
        args=args,
    )


def run(args: list[str]) -> None:
    """Parses ``[verb, ...]`` and runs it."""
    # LightningCLI warns where both its args and the process's own are given.
    sys.argv = ["rpt", *args]
    _quieten()
    make_cli()
