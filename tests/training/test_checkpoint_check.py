"""Damaged and malicious checkpoints, made from real ones."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save

from rpt_lightning.training.checkpoint_check import checkpoint_damage
from rpt_lightning.training.checkpoint_file import read_checkpoint


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """As Lightning's FSDP2 strategy writes them: weights, moments and numbers by torch.distributed.checkpoint, the rest beside."""
    folder = tmp_path / "step-000001.ckpt"
    state = {
        "state_dict": {"policy.model.w": torch.arange(5000.0)},
        "optimizer_0": {"state": {"w": {"step": torch.tensor(3.0)}}, "lr": 0.1, "betas": (0.9, 0.95)},
    }
    save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"rpt": {"global_step": 1}}, folder / "meta.pt")
    return folder


def test_whole_shards_are_read(shards: Path):
    assert checkpoint_damage(shards) is None
    assert torch.equal(read_checkpoint(shards, flag="--ckpt").read(["w"])["w"], torch.arange(5000.0))


@pytest.mark.parametrize("damage", ["cut shard", "no shard", "no index", "cut index", "no rest", "cut rest"])
def test_damaged_shards(shards: Path, damage: str):
    kind, part = damage.split()
    path = {"shard": next(shards.glob("*.distcp")), "index": shards / ".metadata", "rest": shards / "meta.pt"}[part]
    if kind == "no":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert checkpoint_damage(shards) is not None


def test_an_index_that_would_run_code_is_refused_and_not_run(shards: Path, tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (shards / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"--ckpt .*index names posix\.system"):
        read_checkpoint(shards, flag="--ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_flipped_byte_of_a_weight_is_found(tmp_path: Path):
    path = tmp_path / "one.ckpt"
    torch.save({"w": torch.arange(100_000.0)}, path)
    assert checkpoint_damage(path) is None
    content = bytearray(path.read_bytes())
    content[200_000] ^= 0x01
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["w"], torch.arange(100_000.0))  # torch says nothing
    assert "does not have its checksum" in str(checkpoint_damage(path))
    path.write_bytes(content[:-100])
    assert "cannot be read" in str(checkpoint_damage(path))
