from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpt_lightning.rollout.servers.server import Fleet
from rpt_lightning.rollout.weight_sync.checksum import checksum
from rpt_lightning.rollout.weight_sync.transport import SharedFolderTransport

EMBEDDING = torch.arange(600, dtype=torch.float32).view(20, 30) / 7
WEIGHTS = [
    ("model.embed_tokens.weight", EMBEDDING),
    ("model.norm.weight", torch.ones(30).neg()),
    ("lm_head.weight", EMBEDDING),
]
SHAPES = {name: weight.shape for name, weight in WEIGHTS}


@pytest.fixture
def transport(tmp_path: Path):
    transport = SharedFolderTransport(str(tmp_path / "weights"), shard_gib=2000 / 2**30)
    transport.open(Fleet([], key=None, timeout_s=1, request_timeout_s=1))
    yield transport
    transport.close()


def publish(transport: SharedFolderTransport, version: int, dtype: torch.dtype = torch.float32) -> None:
    transport.publish(iter(WEIGHTS), version=version, dtype=dtype, shapes=SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_a_tied_head_too_in_the_servers_dtype(
    transport: SharedFolderTransport, tmp_path: Path, dtype: torch.dtype
) -> None:
    publish(transport, 7, dtype)
    files = sorted((tmp_path / "weights" / "weights-v7").iterdir())
    # A file ends with the tensor that reaches 2,000 bytes: 2,400 | 120 + 2,400 in fp32, 1,200 + 60 + 1,200 in
    # bf16.
    assert len(files) == (2 if dtype == torch.float32 else 1)
    found = {name: weight for file in files for name, weight in load_file(file).items()}
    assert all(torch.equal(found[name], weight.to(dtype)) for name, weight in WEIGHTS)
    assert len(found) == 3


def test_old_versions_go_when_the_new_one_has_arrived(
    transport: SharedFolderTransport, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    (folder / "a user's own file").touch()
    publish(transport, 1)
    transport.retire()
    publish(transport, 2)
    assert {path.name for path in folder.iterdir()} == {"weights-v1", "weights-v2", "a user's own file"}
    transport.retire()
    assert {path.name for path in folder.iterdir()} == {"weights-v2", "a user's own file"}
    publish(transport, 2)  # once more, as after a failed update
    # A killed run leaves its weights behind, and the next start removes them.
    transport._release()  # as the system does when a process ends
    again = SharedFolderTransport(str(folder))
    (folder / "weights-v3.partial").mkdir()
    again.open(Fleet([], key=None, timeout_s=1, request_timeout_s=1))
    assert [path.name for path in folder.iterdir()] == ["a user's own file"]


def test_a_folder_belongs_to_one_run_at_a_time(transport: SharedFolderTransport, tmp_path: Path) -> None:
    publish(transport, 1)
    second = SharedFolderTransport(str(tmp_path / "weights"))
    with pytest.raises(
        ValueError, match=r"transport\.folder=.*weights: another run uses this folder for its weights"
    ):
        second.open(Fleet([], key=None, timeout_s=1, request_timeout_s=1))
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["weights-v1"]
    transport.close()
    second.open(Fleet([], key=None, timeout_s=1, request_timeout_s=1))
    second.close()


def test_a_full_disk_leaves_no_half_version(transport: SharedFolderTransport, tmp_path: Path) -> None:
    publish(transport, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to write more than this, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"transport.folder=.*weights of version 2 could not be written"):
            publish(transport, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["weights-v1"]


def test_checksums_see_dtype_shape_order_and_one_bit() -> None:
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    different = [one, one.t(), one.view(4), one.bfloat16(), one + torch.tensor([[0.0, 0.0], [0.0, 1e-6]])]
    assert len({checksum(tensor) for tensor in different}) == 5
    assert checksum(one.t().t()) == checksum(one.clone())
    assert checksum(torch.tensor(-0.0)) == checksum(torch.tensor(0.0))
