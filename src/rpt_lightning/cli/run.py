"""Lightning's command line with this project's parts: module, data, rollouts, and one folder per run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.cli.former_names import accept_former_names, translated_flags
from rpt_lightning.cli.home_paths import with_home
from rpt_lightning.cli.short_errors import ShortErrors
from rpt_lightning.compat.lightning import OpenCLI, callbacks_of
from rpt_lightning.records.run_folder import (
    ANSWER_FOLDER,
    CONFIG_FILE,
    ROLLOUT_FOLDER,
    STEP_LOG,
    VALIDATION_FOLDER,
)
from rpt_lightning.training.callbacks.answer_results import AnswerResults
from rpt_lightning.training.callbacks.budget import Budget
from rpt_lightning.training.callbacks.health import Health
from rpt_lightning.training.callbacks.logs import RolloutSamples, StepLog, StepProgressBar, ValidationResults
from rpt_lightning.training.callbacks.machine_stats import MachineStats
from rpt_lightning.training.callbacks.missed_validation import MissedValidation, is_missed
from rpt_lightning.training.callbacks.rank_watch import RankWatch
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.callbacks.stop import StopRun
from rpt_lightning.training.checkpoint.callback import (
    FOLDER,
    RunCheckpoint,
    checkpoint_steps,
    last_checkpoint,
)
from rpt_lightning.training.checkpoint.damage import checkpoint_damage
from rpt_lightning.training.checkpoint.reader import check_about, read_checkpoint
from rpt_lightning.training.error_file import folder_named, traceback_kept
from rpt_lightning.training.library_noise import quieten_libraries
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.modules.rpt_module import RPTModule
from rpt_lightning.training.secret_filter import redact

# Imported so that configs may name them by their short names.
from rpt_lightning.objectives.information_gain import InformationGainObjective  # isort: skip
from rpt_lightning.objectives.judges.local_judge import LocalJudge  # isort: skip
from rpt_lightning.objectives.judges.server_judge import ServerJudge  # isort: skip
from rpt_lightning.objectives.next_segment import NextSegmentObjective  # isort: skip
from rpt_lightning.objectives.next_sentence import NextSentenceObjective  # isort: skip
from rpt_lightning.data.modules.answers import AnswerTaskDataModule  # isort: skip
from rpt_lightning.data.modules.corpus import CorpusDataModule  # isort: skip
from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule  # isort: skip
from rpt_lightning.data.modules.mixed import MixedDataModule  # isort: skip
from rpt_lightning.data.sources.questions import HuggingFaceQuestions, JsonlQuestions  # isort: skip
from rpt_lightning.data.modules.text import TextDataModule  # isort: skip
from rpt_lightning.data.modules.traces import TraceDataModule  # isort: skip
from rpt_lightning.objectives.masked_span import MaskedSpanObjective  # isort: skip
from rpt_lightning.objectives.next_token import NextTokenObjective  # isort: skip
from rpt_lightning.objectives.proposed_span import ProposedSpanObjective  # isort: skip
from rpt_lightning.objectives.question import QuestionObjective  # isort: skip
from rpt_lightning.rollout.engines.hf_engine import HFEngine  # isort: skip
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine  # isort: skip
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine  # isort: skip
from rpt_lightning.rollout.weight_sync.nccl_transport import NCCLTransport  # isort: skip
from rpt_lightning.rollout.servers.server_engine import VLLMServerEngine  # isort: skip
from rpt_lightning.rollout.weight_sync.transport import SharedFolderTransport  # isort: skip
from rpt_lightning.training.distributed.strategy import ShardedStrategy  # isort: skip
from rpt_lightning.worlds import Boxes, Cups, Origins, People  # isort: skip

PARTS = (
    ShardedStrategy,
    RPTModule,
    NTPModule,
    TokenTaskDataModule,
    AnswerTaskDataModule,
    CorpusDataModule,
    TextDataModule,
    TraceDataModule,
    MixedDataModule,
    NextTokenObjective,
    InformationGainObjective,
    MaskedSpanObjective,
    ProposedSpanObjective,
    NextSegmentObjective,
    NextSentenceObjective,
    LocalJudge,
    ServerJudge,
    QuestionObjective,
    JsonlQuestions,
    HuggingFaceQuestions,
    HFEngine,
    ScriptedEngine,
    VLLMEngine,
    VLLMServerEngine,
    SharedFolderTransport,
    NCCLTransport,
    Cups,
    Origins,
    People,
    Boxes,
)
# Files that a fit leaves in the run folder, besides checkpoints.
RUN_FILES = (
    *(CONFIG_FILE, "config-[0-9]*.yaml", STEP_LOG, "error-*.txt", "tensorboard", ROLLOUT_FOLDER),
    *(f"{folder}/step-*" for folder in (VALIDATION_FOLDER, ANSWER_FOLDER)),
)
# Records of the weights that a run begins with. A start that failed has not changed them.
_BEFORE = "step-000000."


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved configuration of every start in the run folder.

    The file is ``config.yaml``, or ``config-2.yaml`` and so on for resumed starts.
    """

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        try:
            self._save(trainer, folder, stage)
        except OSError as error:
            raise ValueError(
                f"trainer.default_root_dir={folder}: the run's configuration cannot be written there: "
                f"{error}. Is the disk full? Make room, or name another folder"
            ) from error

    def _save(self, trainer: Trainer, folder: Path, stage: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path, number = (
            folder / (CONFIG_FILE if stage == "fit" else f"config-{TrainerFn(stage).value}.yaml"),
            2,
        )
        while stage == "fit" and path.exists():
            path, number = folder / f"config-{number}.yaml", number + 1
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        path.write_text(yaml.safe_dump(redact(config), sort_keys=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(redact(config))


class RunParser(ShortErrors, LightningArgumentParser):
    """Parser of `rpt fit` and `rpt validate`."""


class RPTCLI(OpenCLI):
    """The command line of a run. ``trainer.default_root_dir`` is the run folder.

    It holds configuration, logs, checkpoints, samples and validation results.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RolloutCallback, "rollout")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(StopRun, "stop")
        parser.add_lightning_class_args(RankWatch, "ranks")
        parser.add_lightning_class_args(RolloutSamples, "samples")
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(Budget, "budget")
        parser.add_lightning_class_args(MachineStats, "machine")
        parser.link_arguments("seed_everything", "rollout.seed")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        verbs = LightningCLI.subcommands()
        # Checkpoints never run code, so weights_only is always on. Our own text shows a validation's numbers,
        # so verbose is always off.
        return {
            "fit": verbs["fit"] | {"weights_only"},
            "validate": verbs["validate"] | {"weights_only", "verbose"},
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        with_home(self.config)

    def read_checkpoint_settings(self) -> None:
        """Do nothing.

        Lightning reads the whole checkpoint here for hyper-parameters. Ours hold none: the configuration is
        in the run folder.
        """

    def make_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        folder = config["default_root_dir"]
        if not folder:
            raise ValueError(
                "trainer.default_root_dir is not set: name the run's folder, "
                "e.g. --trainer.default_root_dir runs/my-run"
            )
        _check_trainer(config)
        if config.get("logger") in (None, True):
            # Ctrl-C in the middle of TensorBoard's queue can leave its thread asleep until its next flush.
            # The end of the run waits for that, 120 s by default.
            config["logger"] = TensorBoardLogger(
                save_dir=str(Path(folder) / "tensorboard"), name="", version="", flush_secs=5
            )
        # Otherwise Lightning would add its own checkpoint callback beside ours.
        config["enable_checkpointing"] = True
        # In a file or a pipe a bar is clutter. One line a step is printed in any case.
        config["enable_progress_bar"] = config.get("enable_progress_bar") is not False and sys.stdout.isatty()
        bar = [StepProgressBar()] if config["enable_progress_bar"] else []
        return super().make_trainer(
            config,
            [
                *callbacks,
                *bar,
                StepLog(),
                ValidationResults(),
                AnswerResults(),
                MissedValidation(),
            ],
        )

    def fit(self, model: PolicyModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Train a run folder's single run, new or resumed.

        A missing checkpoint is an error, and so is a fit that does no step. ``--ckpt_path auto`` is for
        launchers that start a run again and again: it takes the last checkpoint if there is one, and
        otherwise starts a new run.
        """
        _check_pair(model, self.datamodule)
        path = self._checkpoint(ckpt_path)
        if path is None:
            _start_anew(Path(self.trainer.default_root_dir), is_global_zero=self.trainer.is_global_zero)
        checkpoint = next(
            callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)
        )
        checkpoint.resumes_from = path
        folder = Path(self.trainer.default_root_dir)
        with folder_named(folder), traceback_kept(folder, rank=self.trainer.global_rank):
            self.trainer.fit(model, ckpt_path=path, weights_only=True, **kwargs)
        # The callback counts on every rank. The step at which a resumed run begins is known only inside fit.
        if checkpoint.start_step in (None, self.trainer.global_step):
            (budget,) = callbacks_of(self.trainer, Budget)
            is_complete = 0 < self.trainer.max_steps <= self.trainer.global_step or budget.is_spent
            # The run may have been killed in the validation, and no further step would make up for it.
            if is_complete and is_missed(self.trainer):
                rank_zero_info(
                    "the run is complete except for the validation at its last step, "
                    f"{self.trainer.global_step}, which runs now"
                )
                self.trainer.validate(
                    model, ckpt_path=path, weights_only=True, verbose=False, datamodule=self.datamodule
                )
                return
            # A chain of jobs ends with this, and must not take it for a failure.
            if ckpt_path == "auto" and is_complete:
                rank_zero_info(
                    f"the run is complete: it is at step {self.trainer.global_step}, and nothing is left to "
                    "do"
                )
                return
            raise ValueError(
                f"the run did no step: it is already at step {self.trainer.global_step} of "
                f"trainer.max_steps={self.trainer.max_steps}; raise trainer.max_steps"
            )

    def validate(self, model: PolicyModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Validate the weights that model.policy.path names, or a checkpoint of them."""
        self.trainer.validate(
            model, ckpt_path=self._checkpoint(ckpt_path), weights_only=True, verbose=False, **kwargs
        )

    def _checkpoint(self, ckpt_path: str | None) -> str | None:
        """The requested checkpoint.

        It is checked before the run starts, so that an unusable file gives one clear error.
        """
        if ckpt_path == "auto" and not checkpoint_steps(Path(self.trainer.default_root_dir) / FOLDER):
            return None
        if ckpt_path is None:
            return None
        path = (
            last_checkpoint(Path(self.trainer.default_root_dir))
            if ckpt_path in ("last", "auto")
            else Path(ckpt_path)
        )
        check_about(read_checkpoint(path, flag="--ckpt_path").about, f"--ckpt_path {path}", resumes=True)
        if ckpt_path not in ("last", "auto") and (damage := checkpoint_damage(path)):
            raise ValueError(
                f"--ckpt_path {path} is not a whole checkpoint: {damage}; "
                "name another checkpoint of its folder, or --ckpt_path last"
            )
        if path.is_dir() and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"--ckpt_path {path}: it is stored in shards, which a strategy without shards cannot read; "
                "add --config configs/strategy/fsdp2.yaml (any number of --trainer.devices, 1 as well), or "
                "start a new run from a model that `rpt export` makes of it"
            )
        return str(path)


def _check_trainer(config: Mapping[str, Any]) -> None:
    """Raise ValueError for settings that Lightning would reject later, or never."""
    for name, lowest in (
        ("val_check_interval", "above 0"),
        ("check_val_every_n_epoch", "1 or more"),
        ("num_nodes", "1 or more"),
    ):
        value = config.get(name)
        if isinstance(value, (int, float)) and value <= 0:
            raise ValueError(
                f"--trainer.{name} {value}: give a number {lowest}"
                + ("; for no validation give --trainer.limit_val_batches 0" if "val_" in name else "")
            )
    devices = config.get("devices")
    number = int(devices) if isinstance(devices, str) and devices.lstrip("-").isdigit() else devices
    if isinstance(number, int) and (number == 0 or number < -1):
        raise ValueError(f"--trainer.devices {devices}: give how many, 1 or more, or -1 for all GPUs")


def _check_pair(module: PolicyModule, data: LightningDataModule) -> None:
    """Raise ValueError if our data module makes batches that the module cannot train on.

    A user's own data module may make any batch. Each of ours makes one kind.
    """
    makes = getattr(data, "makes", None)
    if makes is not None and (makes == "tasks") != module.learns_from_rollouts:
        fitting = (
            "TokenTaskDataModule or AnswerTaskDataModule"
            if module.learns_from_rollouts
            else "TextDataModule, TraceDataModule, CorpusDataModule or MixedDataModule"
        )
        raise ValueError(
            f"model={type(module).__name__} and data={type(data).__name__} do not fit together: "
            f"{type(module).__name__} learns from "
            f"{'tasks by reasoning' if module.learns_from_rollouts else 'given sequences'}; give --data "
            f"{fitting}, or another --model"
        )


def _start_anew(folder: Path, *, is_global_zero: bool) -> None:
    """Refuse a folder whose run can be resumed, and move aside the files of a start without a checkpoint.

    Otherwise the logs of the two starts would mix.
    """
    steps = checkpoint_steps(folder / FOLDER)
    if steps:
        raise ValueError(
            f"trainer.default_root_dir={folder} already holds a run (its last checkpoint: step {steps[-1]}); "
            "continue it with --ckpt_path last, or name another folder with --trainer.default_root_dir"
        )
    if not is_global_zero or not (folder / CONFIG_FILE).exists():
        return
    number = 1
    while (aside := folder / f"failed-start-{number}").exists():
        number += 1
    aside.mkdir()
    for path in sorted(
        path for pattern in RUN_FILES for path in folder.glob(pattern) if not path.name.startswith(_BEFORE)
    ):
        target = aside / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    rank_zero_info(
        f"{folder} holds a start that reached no checkpoint: its files are now in {aside.name}/, "
        "and the run starts anew"
    )


def make_cli(
    cli: type[RPTCLI] = RPTCLI,
    *,
    run: bool = True,
    args: list[str] | None = None,
    prog: str = "rpt",
    description: str = "Train or validate a policy.",
) -> RPTCLI:
    """Build the command line and run it, or only build it (``run=False``, without a verb in ``args``).

    ``prog`` and ``description`` appear in the help.
    """
    accept_former_names()
    if args is None:
        # In place: Lightning starts further ranks with these words.
        sys.argv[1:] = translated_flags(sys.argv[1:])
    else:
        args = translated_flags(args)
    return cli(
        model_class=PolicyModule,
        subclass_mode_model=True,
        datamodule_class=LightningDataModule,
        subclass_mode_data=True,
        parser_class=RunParser,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        # Inference tensors cannot be gathered from shards. With gloo alone Lightning avoids them, so CPUs do
        # not show the problem.
        trainer_defaults={
            "inference_mode": False,
            "logger": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
        },
        parser_kwargs={"prog": prog, "description": description},
        run=run,
        args=args,
    )


def run(args: list[str]) -> None:
    """Parse ``[verb, ...]`` and run it."""
    # LightningCLI warns if both its args and the process's own are given. The first word stays: Lightning
    # starts further ranks with it.
    sys.argv[1:] = args
    quieten_libraries()
    make_cli()
