from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpt_lightning.rollout.servers.server import Fleet
from rpt_lightning.rollout.weight_sync.checksum import checksum
from rpt_lightning.rollout.weight_sync.published_folder import HeldWeights
from rpt_lightning.rollout.weight_sync.sent_weights import SentWeights
from rpt_lightning.rollout.weight_sync.transport import SharedFolderTransport

EMBEDDING = torch.arange(600, dtype=torch.float32).view(20, 30) / 7
WEIGHTS = [
    ("model.embed_tokens.weight", EMBEDDING),
    ("model.norm.weight", torch.ones(30).neg()),
    ("lm_head.weight", EMBEDDING),
]
SHAPES = {name: weight.shape for name, weight in WEIGHTS}


NO_SERVERS = Fleet([], key=None, timeout_s=1, request_timeout_s=1)
Weights = list[tuple[str, torch.Tensor]]


def make_transport(tmp_path: Path, **changes: int) -> SharedFolderTransport:
    transport = SharedFolderTransport(str(tmp_path / "weights"), shard_gib=2000 / 2**30, **changes)
    transport.open(NO_SERVERS)
    return transport


def publish(
    transport: SharedFolderTransport,
    version: int,
    weights: Weights = WEIGHTS,
    dtype: torch.dtype = torch.float32,
) -> None:
    transport.publish(iter(weights), version=version, dtype=dtype, shapes=SHAPES)


def changed(num_entries: int) -> Weights:
    """Some entries of the embedding, and so of the head, have other values."""
    embedding = EMBEDDING.clone()
    embedding.view(-1)[:num_entries] += 1.0
    return [(name, embedding if weight is EMBEDDING else weight) for name, weight in WEIGHTS]


def assert_held(held: HeldWeights, tmp_path: Path, version: int, weights: Weights) -> None:
    loaded = dict(held.load(tmp_path / "weights" / f"weights-v{version}"))
    assert loaded.keys() == dict(weights).keys()
    for name, weight in weights:
        assert torch.equal(loaded[name].view(torch.int32), weight.view(torch.int32)), name


@pytest.mark.parametrize("full_every", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_a_tied_head_too_in_the_servers_dtype(
    tmp_path: Path, dtype: torch.dtype, full_every: int
) -> None:
    transport = make_transport(tmp_path, full_every=full_every)
    publish(transport, 7, dtype=dtype)
    files = sorted((tmp_path / "weights" / "weights-v7").glob("*.safetensors"))
    # A file ends with the tensor that reaches 2,000 bytes: 2,400 | 120 + 2,400 in fp32, 1,200 + 60 + 1,200 in
    # bf16.
    assert len(files) == (2 if dtype == torch.float32 else 1)
    found = {name: weight for file in files for name, weight in load_file(file).items()}
    assert all(torch.equal(found[name], weight.to(dtype)) for name, weight in WEIGHTS)
    assert len(found) == 3
    num_bytes = 1230 * dtype.itemsize
    assert transport.sent == SentWeights(num_bytes=num_bytes, num_full_bytes=num_bytes, changed_frac=1.0)
    transport.close()


def test_old_versions_go_when_no_server_can_need_them(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    transport = make_transport(tmp_path, full_every=3)
    (folder / "a user's own file").touch()

    def versions() -> set[str]:
        return {path.name for path in folder.iterdir()} - {"a user's own file"}

    publish(transport, 1)
    transport.retire()
    publish(transport, 2, changed(1))
    publish(transport, 3, changed(2))
    transport.retire()
    assert versions() == {"weights-v1", "weights-v2", "weights-v3"}  # patches on patches on a full set
    publish(transport, 4, changed(3))
    assert versions() == {"weights-v1", "weights-v2", "weights-v3", "weights-v4"}  # until all servers have it
    transport.retire()
    assert versions() == {"weights-v4"}
    publish(transport, 4, changed(3))  # once more, as after a failed update
    assert (folder / "a user's own file").exists()
    # A killed run leaves its weights behind, and the next start removes them.
    transport._release()  # as the system does when a process ends
    again = SharedFolderTransport(str(folder))
    (folder / "weights-v5.partial").mkdir()
    again.open(NO_SERVERS)
    assert versions() == set()
    again.close()


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    transport = make_transport(tmp_path)
    publish(transport, 1)
    second = SharedFolderTransport(str(tmp_path / "weights"))
    with pytest.raises(
        ValueError, match=r"transport\.folder=.*weights: another run uses this folder for its weights"
    ):
        second.open(NO_SERVERS)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["weights-v1"]
    transport.close()
    second.open(NO_SERVERS)
    second.close()


@pytest.mark.parametrize("full_every", [0, -1])
def test_full_every_is_at_least_1(tmp_path: Path, full_every: int) -> None:
    with pytest.raises(ValueError, match=f"transport.full_every={full_every} must be at least 1"):
        SharedFolderTransport(str(tmp_path), full_every=full_every)


@pytest.mark.parametrize("full_every", [1, 10])
def test_a_full_disk_leaves_no_half_version(tmp_path: Path, full_every: int) -> None:
    transport = make_transport(tmp_path, full_every=full_every)
    publish(transport, 1)
    later = [(name, weight + 1) for name, weight in WEIGHTS]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to write more than this, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"transport.folder=.*weights of version 2 could not be written"):
            publish(transport, 2, later)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["weights-v1"]
    # Some tensors had been compared before the disk was full. Nothing is lost when there is room again.
    publish(transport, 2, later)
    assert_held(HeldWeights(), tmp_path, 2, later)
    held = HeldWeights()
    assert_held(held, tmp_path, 1, WEIGHTS)
    assert_held(held, tmp_path, 2, later)
    transport.close()


def test_checksums_see_dtype_shape_order_and_one_bit() -> None:
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    different = [one, one.t(), one.view(4), one.bfloat16(), one + torch.tensor([[0.0, 0.0], [0.0, 1e-6]])]
    assert len({checksum(tensor) for tensor in different}) == 5
    assert checksum(one.t().t()) == checksum(one.clone())
    assert checksum(torch.tensor(-0.0)) == checksum(torch.tensor(0.0))
