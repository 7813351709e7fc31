"""Damaged and malicious checkpoints, made from real ones."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import save

from rpt_lightning.training.checkpoint.damage import checkpoint_damage
from rpt_lightning.training.checkpoint.reader import read_checkpoint


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A checkpoint as Lightning's FSDP2 strategy writes it.

    torch.distributed.checkpoint writes weights, moments and numbers; the rest is beside them.
    """
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
    path = {
        "shard": next(shards.glob("*.distcp")),
        "index": shards / ".metadata",
        "rest": shards / "meta.pt",
    }[part]
    if kind == "no":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert checkpoint_damage(shards) is not None


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


@pytest.mark.parametrize(
    "name", [("posix", "system"), ("torch.distributed.checkpoint.filesystem", "os.system")]
)
def test_an_index_that_would_run_code_is_refused_and_not_run(
    shards: Path, tmp_path: Path, name: tuple[str, str]
):
    """The second function is reached through a module that an index names for its own records."""
    index = pickle.dumps(Call(os.system, f"touch {tmp_path}/ran"), protocol=4)
    module, function = (pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in name)
    (shards / ".metadata").write_bytes(
        index.replace(b"\x8c\x05posix", module)
        .replace(b"\x8c\x06system", function)
        .replace(index[2:11], b"", 1)
    )
    with pytest.raises(ValueError, match=rf"--ckpt .*index names {name[0]}\.{name[1]}"):
        read_checkpoint(shards, flag="--ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_number_in_a_shard_that_would_run_code_is_refused_and_not_run(tmp_path: Path):
    """torch.distributed.checkpoint unpickles everything that is not a tensor."""
    folder = tmp_path / "step-000001.ckpt"
    save(
        {"optimizer_0": {"lr": Call(os.system, f"touch {tmp_path}/ran")}}, checkpoint_id=folder, no_dist=True
    )
    torch.save({"rpt": {"global_step": 1}}, folder / "meta.pt")
    with pytest.raises(ValueError, match=r"--ckpt .*it cannot be read \(UnpicklingError"):
        read_checkpoint(folder, flag="--ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_flipped_byte_of_a_weight_is_found(tmp_path: Path):
    path = tmp_path / "one.ckpt"
    torch.save({"w": torch.arange(100_000.0)}, path)
    assert checkpoint_damage(path) is None
    content = bytearray(path.read_bytes())
    content[200_000] ^= 0x01
    path.write_bytes(content)
    assert not torch.equal(
        torch.load(path, weights_only=True)["w"], torch.arange(100_000.0)
    )  # torch says nothing
    assert "does not have its checksum" in str(checkpoint_damage(path))
    path.write_bytes(content[:-100])
    assert "cannot be read" in str(checkpoint_damage(path))
