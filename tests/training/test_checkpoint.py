"""Checkpoints on bad days: a full disk, a run that goes back, a file that cannot be read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rpt_lightning.training.checkpoint.callback import RunCheckpoint, checkpoint_steps, last_checkpoint
from rpt_lightning.training.checkpoint.reader import read_checkpoint
from rpt_lightning.training.checkpoint.writer import StreamedCheckpointIO


class SavesBytes:
    """Stands in for Lightning's trainer.

    Its save writes ``num_bytes`` of the state to disk until the disk is full, as the real one does.
    """

    is_global_zero = True
    strategy = SimpleNamespace(barrier=lambda name: None)
    current_epoch = 0
    fit_loop = SimpleNamespace(state_dict=dict)
    datamodule = None

    def __init__(self, folder: Path) -> None:
        self.default_root_dir = folder
        self.global_step = 0
        self.num_bytes = 0

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        StreamedCheckpointIO().save_checkpoint({"x": torch.zeros(self.num_bytes // 4)}, path)


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("small_disk", [2], indirect=True)
def test_a_full_disk_is_one_clear_error_and_leaves_the_last_checkpoint(small_disk: Path):
    trainer, callback = SavesBytes(small_disk), RunCheckpoint(every_n_steps=1)
    callback.on_train_start(trainer, None)
    trainer.global_step, trainer.num_bytes = 1, 1_500_000
    callback.on_train_batch_end(trainer, None, None, None, 0)
    trainer.global_step = 2
    with pytest.raises(
        RuntimeError,
        match=r"cannot write the checkpoint of step 2 into .*disk/checkpoints: "
        r".*step-000001.ckpt: continue with --ckpt_path last",
    ):
        callback.on_train_batch_end(trainer, None, None, None, 1)
    assert saved(small_disk) == ["step-000001.ckpt"]
    trainer.num_bytes = 100_000  # there is room again
    callback.on_train_batch_end(trainer, None, None, None, 1)
    assert saved(small_disk) == ["step-000001.ckpt", "step-000002.ckpt"]


@pytest.mark.parametrize("small_disk", [2], indirect=True)
def test_a_full_disk_before_the_first_checkpoint(small_disk: Path):
    trainer, callback = SavesBytes(small_disk), RunCheckpoint(every_n_steps=1)
    callback.on_train_start(trainer, None)
    trainer.global_step, trainer.num_bytes = 1, 4_000_000
    with pytest.raises(RuntimeError, match="no complete checkpoint yet: the same command starts anew"):
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert saved(small_disk) == []


def test_going_back_moves_later_checkpoints_aside(make_run, tmp_path: Path):
    run = tmp_path / "run"

    def fit(max_steps, start=None):
        trainer, module, data = make_run(max_steps, run_dir=run)
        trainer.fit(module, data, ckpt_path=start, weights_only=True)

    fit(4)
    assert checkpoint_steps(run / "checkpoints") == [3, 4]  # the default keeps two
    abandoned = (run / "checkpoints" / "step-000004.ckpt").read_bytes()
    first = tmp_path / "step-000003.ckpt"
    first.write_bytes((run / "checkpoints" / first.name).read_bytes())
    (run / "checkpoints" / "step-000900.ckpt").write_bytes(
        b"a later one"
    )  # it would be the last one and prune each new one

    fit(4, str(first))
    assert saved(run) == [
        "step-000003.ckpt",
        "step-000004.ckpt",
        "step-000004.ckpt.abandoned",
        "step-000900.ckpt.abandoned",
    ]
    assert last_checkpoint(run).name == "step-000004.ckpt"
    assert (run / "checkpoints" / "step-000004.ckpt.abandoned").read_bytes() == abandoned

    fit(4, str(first))  # a second time: no file that was moved aside is overwritten
    assert "step-000004.ckpt.2.abandoned" in saved(run)
    assert (run / "checkpoints" / "step-000004.ckpt.abandoned").read_bytes() == abandoned


def test_start_step_is_known_on_every_rank_and_only_if_training_began(make_run, tmp_path: Path):
    trainer, module, data = make_run(2, run_dir=tmp_path / "run")
    callback = trainer.checkpoint_callback
    assert callback.start_step is None
    trainer.fit(module, data)
    assert callback.start_step == 0
    trainer, module, data = make_run(2, run_dir=tmp_path / "run")
    trainer.fit(module, data, ckpt_path=str(last_checkpoint(tmp_path / "run")), weights_only=True)
    assert trainer.checkpoint_callback.start_step is None

    not_first = SimpleNamespace(global_step=7, is_global_zero=False, default_root_dir=tmp_path)
    callback.on_train_start(not_first, None)
    assert callback.start_step == 7


def test_files_that_are_no_checkpoint_of_ours(tmp_path: Path):
    good = tmp_path / "good.ckpt"
    torch.save({"rpt": {}, "state_dict": {"policy.model.x": torch.arange(1000)}}, good)
    assert torch.equal(read_checkpoint(good, flag="--ckpt").read(["x"])["x"], torch.arange(1000))
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "empty.ckpt").touch()
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "foreign.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    unreadable, foreign = "not a checkpoint that can be read", "not a checkpoint of `rpt fit`"
    expected = {
        "cut": unreadable,
        "text": unreadable,
        "empty": unreadable,
        "foreign": foreign,
        "list": foreign,
        "gone": "no such file",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=rf"--ckpt_path .*{name}\.ckpt: {message}"):
            read_checkpoint(tmp_path / f"{name}.ckpt", flag="--ckpt_path")
