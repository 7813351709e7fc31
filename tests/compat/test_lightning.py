from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from reliance import check_has, check_source

from rpt_lightning.compat import lightning as compat
from rpt_lightning.compat import lightning_checkpoint as layout
from rpt_lightning.data.modules.base import EvalLoader, StepLoader


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.num_made = 0

    def _batch(self) -> dict[str, Any]:
        self.num_made += 1
        return {"number": self.num_made}

    def train_dataloader(self) -> StepLoader:
        return StepLoader(self._batch, num_steps=2)

    def val_dataloader(self) -> EvalLoader:
        return EvalLoader((1, 2), batch_size=1, rank=0, num_ranks=1)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        return {"num_made": self.num_made}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_made = state_dict["num_made"]


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.num_validated = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.num_validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Look(Callback):
    def __init__(self) -> None:
        self.validated_at_start = 0
        self.seen: list[tuple[int, int, bool]] = []  # index of the batch, batches made, whether one is due
        self.place: dict[str, Any] = {}
        self.was_training = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        compat.run_validation(trainer)
        self.validated_at_start, self.was_training = pl_module.num_validated, trainer.training  # type: ignore

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        made = trainer.datamodule.num_made  # type: ignore[attr-defined]
        self.seen.append((compat.batch_index(trainer), made, compat.is_validation_due(trainer)))
        if trainer.global_step == 3:
            self.place = layout.place_of(trainer)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Look, Trainer, dict[str, Any]]:
    """A fit of two passes over two batches each, with a validation after every second batch."""
    folder, look = tmp_path_factory.mktemp("run"), Look()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[look],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), Data())
    trainer.save_checkpoint(folder / "last.ckpt")
    return look, trainer, torch.load(folder / "last.ckpt", weights_only=True)


def test_the_loops_say_where_they_are(run: tuple[Look, Trainer, dict[str, Any]]) -> None:
    look, _, _ = run
    assert [index for index, _, _ in look.seen] == [0, 1, 2, 3], "total_batch_idx counts in another way"
    assert [is_due for _, _, is_due in look.seen] == [False, True, False, True], (
        "_should_check_val_fx no longer says whether a validation is due after this batch"
    )


def test_no_batch_is_fetched_ahead_from_a_loader_with_a_length(
    run: tuple[Look, Trainer, dict[str, Any]],
) -> None:
    """`StepLoader` has a length for this reason: the place of its stream is that of the last step."""
    assert [made for _, made, _ in run[0].seen] == [1, 2, 3, 4], (
        "Lightning fetches batches ahead of the steps"
    )


def test_the_trainer_lists_its_callbacks_by_class(run: tuple[Look, Trainer, dict[str, Any]]) -> None:
    look, trainer, _ = run
    assert compat.callbacks_of(trainer, Look) == [look]
    assert look in compat.callbacks_of(trainer, Callback)
    assert compat.callbacks_of(trainer, RichProgressBar) == []


def test_a_validation_runs_in_the_middle_of_a_fit(run: tuple[Look, Trainer, dict[str, Any]]) -> None:
    look, _, _ = run
    assert look.validated_at_start == 2, "val_loop.run() did not validate both batches"
    assert look.was_training


def test_a_checkpoint_has_the_entries_that_we_replace(run: tuple[Look, Trainer, dict[str, Any]]) -> None:
    look, _, checkpoint = run
    assert look.place.keys() == {"epoch", "loops", "Data"}
    assert look.place.keys() <= checkpoint.keys(), f"a checkpoint now holds {sorted(checkpoint)}"
    assert look.place["Data"] == {"num_made": 3}
    loops, place = checkpoint["loops"], look.place["loops"]["fit_loop"]
    assert place.keys() == loops["fit_loop"].keys(), "the fit loop's state has another form in a checkpoint"
    changed = dict(checkpoint)
    layout.set_place(changed, look.place)
    assert changed["Data"] == {"num_made": 3}
    assert changed["loops"]["fit_loop"] == place
    assert changed["loops"].keys() == loops.keys()
    assert changed["state_dict"] is checkpoint["state_dict"]


def test_sharded_checkpoints_have_the_file_and_the_names_that_we_read() -> None:
    assert _METADATA_FILENAME == layout.SHARDED_REST, "Lightning names the file beside the shards differently"
    # torch.distributed.checkpoint joins the names of nested entries by a dot.
    assert layout.SHARDED_WEIGHTS == "state_dict."
    check_source(
        ModelParallelStrategy.save_checkpoint,
        '{"state_dict": checkpoint.pop("state_dict")}',
        used_by="SHARDED_WEIGHTS",
    )


def test_the_trainer_knows_what_started_the_process(run: tuple[Look, Trainer, dict[str, Any]]) -> None:
    assert isinstance(compat.cluster_environment(run[1]), ClusterEnvironment)


def test_strategies_hold_their_time_limit() -> None:
    limit = timedelta(seconds=77)
    for strategy in (DDPStrategy(timeout=limit), ModelParallelStrategy(timeout=limit)):
        assert compat.collective_timeout(strategy) == limit, f"{type(strategy).__name__} keeps it elsewhere"


def test_the_data_parallel_rank_comes_from_the_strategy() -> None:
    check_has(DDPStrategy, "distributed_sampler_kwargs", used_by=compat.data_rank)

    class Mesh(dict):  # type: ignore[type-arg]
        def size(self) -> int:
            return 3

        def get_local_rank(self) -> int:
            return 2

    strategy: Any = ModelParallelStrategy()
    strategy._device_mesh = {"data_parallel": Mesh()}
    assert compat.data_rank(strategy) == (2, 3), "ModelParallelStrategy counts ranks in another way"
    assert compat.data_rank(None) == (0, 1)
    assert compat.data_rank(SimpleNamespace()) == (0, 1)


def test_the_sizes_of_the_mesh_can_be_read_and_set() -> None:
    strategy = ModelParallelStrategy(tensor_parallel_size=2)
    assert compat.tensor_parallel_size(strategy) == 2
    compat.set_data_parallel_size(strategy, 3)
    check_source(
        ModelParallelStrategy.setup_environment,
        "self._data_parallel_size, self._tensor_parallel_size",
        used_by=compat.set_data_parallel_size,
    )
    check_has(ModelParallelStrategy, "model_to_device", used_by="training.strategy.ShardedStrategy")


def test_a_module_knows_its_trainer_and_device() -> None:
    module = Module()
    assert not compat.has_trainer(module)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert compat.has_trainer(module)
    compat.set_device(module, torch.device("meta"))
    assert module.device == torch.device("meta")


def test_the_command_line_calls_the_steps_that_we_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    check_source(LightningCLI.__init__, "self._parse_ckpt_path()", "self._set_seed()", used_by=compat.OpenCLI)
    check_source(
        LightningCLI.instantiate_trainer, "return self._instantiate_trainer(", used_by=compat.OpenCLI
    )
    called: list[Any] = []
    monkeypatch.setattr(LightningCLI, "_parse_ckpt_path", lambda cli: called.append("checkpoint"))
    monkeypatch.setattr(LightningCLI, "_set_seed", lambda cli: called.append("seed"))
    monkeypatch.setattr(LightningCLI, "_instantiate_trainer", lambda cli, *given: called.append(given))
    cli = object.__new__(compat.OpenCLI)
    cli._parse_ckpt_path()
    cli._set_seed()
    cli._instantiate_trainer({"one": 1}, [])
    assert called == ["checkpoint", "seed", ({"one": 1}, [])]
    for name in ("read_checkpoint_settings", "seed_run", "make_trainer"):
        assert not hasattr(LightningCLI, name), f"Lightning now has {name} itself; rename ours"


def test_the_progress_bar_asks_for_our_text() -> None:
    check_source(
        RichProgressBar, "self._get_train_description(", used_by=compat.DescribedProgressBar.describe_pass
    )
    assert not hasattr(RichProgressBar, "describe_pass"), (
        "Lightning now has describe_pass itself; rename ours"
    )

    class Bar(compat.DescribedProgressBar):
        def describe_pass(self, current_epoch: int) -> str:
            return f"pass {current_epoch}"

    assert Bar()._get_train_description(3) == "pass 3"


def test_messages_go_to_the_logger_that_we_filter(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(compat.MESSAGE_LOGGER)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        rank_zero_info("a message of this test")
    finally:
        logger.removeHandler(handler)
    assert records == ["a message of this test"], "rank_zero_info writes to another logger"


def test_checkpoint_callbacks_come_last(tmp_path: Path) -> None:
    """`StopRun` and `MissedValidation` are checkpoint callbacks for this reason."""

    class First(Checkpoint):
        pass

    class Second(Checkpoint):
        pass

    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[First(), Second(), Look()],
    )
    names = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert names[-2:] == ["First", "Second"], f"Lightning calls the callbacks in the order {names}"
    assert "Look" in names[:-2]
