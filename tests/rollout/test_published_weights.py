"""What a server gets from a shared folder: after many steps, late, after missed versions, from bad files."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rpt_lightning.rollout.servers.server import Fleet, ServerLost
from rpt_lightning.rollout.weight_sync.folder_writer import FolderWriter
from rpt_lightning.rollout.weight_sync.published_folder import (
    DamagedWeights,
    HeldWeights,
    Manifest,
    state_digest,
    tensor_digest,
)
from rpt_lightning.rollout.weight_sync.transport import SharedFolderTransport

SHAPES = {"embed": (97, 12), "layer.weight": (24, 12), "norm": (12,), "scale": (), "head": (97, 12)}


class Run:
    """A trainer whose weights change a little in each version, and its shared folder."""

    def __init__(
        self, root: Path, *, dtype: torch.dtype = torch.bfloat16, full_every: int = 4, share: float = 0.03
    ) -> None:
        root.mkdir(exist_ok=True)
        self.dtype = dtype
        self.share = share
        self.generator = torch.Generator().manual_seed(0)
        self.weights = {name: torch.randn(shape, generator=self.generator) for name, shape in SHAPES.items()}
        self.writer = FolderWriter(root, shard_bytes=1500, full_every=full_every)
        self.root = root
        self.version = 0
        self.wanted: dict[int, dict[str, Tensor]] = {}

    def step(self) -> Path:
        """Publish the next version and return its folder."""
        self.version += 1
        for name, weight in self.weights.items():
            drawn = torch.rand(weight.shape, generator=self.generator) < self.share
            self.weights[name] = torch.where(
                drawn, torch.randn(weight.shape, generator=self.generator), weight
            )
        if self.version == 3:  # values that are not numbers come through too
            self.weights["layer.weight"][0, 0] = float("nan")
            self.weights["layer.weight"][0, 1] = -0.0
        return self.publish()

    def publish(self) -> Path:
        folder = self.writer.write(iter(self.weights.items()), version=self.version, dtype=self.dtype)
        self.wanted[self.version] = {name: weight.to(self.dtype) for name, weight in self.weights.items()}
        return folder

    def retire(self) -> None:
        for path in self.root.iterdir():
            if path not in self.writer.needed:
                shutil.rmtree(path)

    def assert_loads(self, held: HeldWeights, folder: Path) -> None:
        """The server's weights are this version's, bit for bit."""
        wanted = self.wanted[int(folder.name.removeprefix("weights-v"))]
        loaded = dict(held.load(folder))
        assert loaded.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
            assert loaded[name].view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8)), name


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "weights")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("full_every", [1, 2, 7])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_many_versions_arrive_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, full_every: int, share: float
) -> None:
    run = Run(tmp_path / "weights", dtype=dtype, full_every=full_every, share=share)
    always, now_and_then = HeldWeights(), HeldWeights()
    for version in range(1, 31):
        folder = run.step()
        run.assert_loads(always, folder)
        if version % 5 == 0:  # it missed the four before
            run.assert_loads(now_and_then, folder)
        run.assert_loads(HeldWeights(), folder)  # it comes late
        run.retire()
        assert len(list(run.root.iterdir())) <= full_every


def test_only_what_changed_is_sent(run: Run) -> None:
    run.step()
    # 1164 + 288 + 12 + 1 + 1164 entries of 2 bytes
    assert (run.writer.sent.num_bytes, run.writer.sent.num_full_bytes) == (5258, 5258)
    run.weights["embed"][5, 3] += 1.0
    run.weights["head"][7] += 1.0
    run.version += 1
    folder = run.publish()
    # An entry: two bytes, and a byte of gap (5 * 12 + 3 = 63 unchanged ones). A row: 24 bytes, and one.
    assert run.writer.sent.num_bytes == 3 + 25
    assert run.writer.sent.num_full_bytes == 0
    assert run.writer.sent.changed_frac == pytest.approx(13 / 2629)
    manifest = Manifest.read(folder)
    assert (dict(manifest.blocks), manifest.base.version) == ({"embed": 1, "head": 12}, 1)
    assert manifest.digests.keys() == {"embed", "head"}
    run.version += 1
    run.publish()  # nothing changed, so no file but the manifest
    assert [path.name for path in (run.root / "weights-v3").iterdir()] == ["manifest.json"]
    assert run.writer.sent.num_bytes == run.writer.sent.changed_frac == 0


def test_a_full_set_every_so_often_for_servers_that_come_late(run: Run) -> None:
    held, found = HeldWeights(), []
    for _ in range(9):
        folder = run.step()
        manifest = Manifest.read(folder)
        found.append((manifest.base is not None, manifest.full_files is not None))
        for file in folder.glob("model-*") if manifest.base is not None else ():
            file.unlink()  # a server that has the version before does not read them
        run.assert_loads(held, folder)
    patches, both = (True, False), (True, True)
    assert found == [(False, True), patches, patches, patches, both, patches, patches, patches, both]


def test_patches_are_not_sent_while_they_are_no_smaller(tmp_path: Path) -> None:
    run = Run(tmp_path / "weights", share=1.0)
    found = []
    for share in (1.0, 1.0, 1.0, 0.01, 0.01, 1.0, 0.01):
        run.share = share
        manifest = Manifest.read(run.step())
        found.append((manifest.base is not None, manifest.full_files is not None))
    # The size of a version's patches decides about the next one. The second version has none before it.
    assert found == [
        (False, True),
        (True, False),
        (False, True),
        (False, True),
        (True, False),
        (True, False),
        (False, True),
    ]


def test_a_version_that_is_not_later_is_a_full_set(run: Run) -> None:
    """As after a failed update, or in an evaluation of several policies."""
    for version in (5, 5, 2, 3):
        run.version = version - 1
        manifest = Manifest.read(run.step())
        assert (manifest.base is None) == (version != 3)
        run.assert_loads(HeldWeights(), run.root / f"weights-v{version}")


def test_a_server_of_another_run_starts_from_a_full_set(run: Run, tmp_path: Path) -> None:
    other, held = Run(tmp_path / "other", share=0.5), HeldWeights()
    other.assert_loads(held, other.step())
    run.step()
    run.assert_loads(held, run.step())


# Faults. Whatever is wrong, no weights come out, and a full set helps.


def flip_a_byte(file: Path, place: int = -3) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def edit(folder: Path, **fields: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | fields))


def delta(folder: Path) -> Path:
    return next(folder.glob("delta-*"))


FAULTS = {
    "a flipped bit": lambda folder: flip_a_byte(delta(folder)),
    "a torn file": lambda folder: delta(folder).write_bytes(delta(folder).read_bytes()[:-20]),
    "an empty file": lambda folder: delta(folder).write_bytes(b""),
    "a missing file": lambda folder: delta(folder).unlink(),
    "a torn manifest": lambda folder: (folder / "manifest.json").write_text('{"format": 1, "vers'),
    "a manifest of another format": lambda folder: edit(folder, format=2),
    "another base": lambda folder: edit(
        folder, base={"state": "other", "version": 2, "folder": "weights-v2"}
    ),
    "a base that is gone": lambda folder: shutil.rmtree(folder.with_name("weights-v2")),
    "its own base": lambda folder: edit(
        folder, base={"state": "other", "version": 3, "folder": "weights-v3"}
    ),
    "a manifest without a tensor": lambda folder: edit(folder, digests={}),
    "blocks that do not fit": lambda folder: edit(folder, blocks=dict.fromkeys(SHAPES, 7)),
    "a manifest without a file": lambda folder: edit(folder, patch_files=[]),
    "another state": lambda folder: edit(folder, state="other"),
}


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_patches_are_never_loaded(run: Run, fault: str, is_late: bool) -> None:
    held = HeldWeights()
    run.step()
    if not is_late:
        run.assert_loads(held, run.root / "weights-v1")
    run.step()
    folder = run.step()
    FAULTS[fault](folder)
    with pytest.raises(DamagedWeights):
        held.load(folder)
    # The trainer writes all weights again. The next version's patches apply to these.
    run.writer.mend()
    run.assert_loads(held, folder)
    manifest = Manifest.read(run.step())
    assert manifest.base is not None
    run.assert_loads(held, run.root / "weights-v4")
    run.retire()
    run.assert_loads(HeldWeights(), run.root / "weights-v4")


@pytest.mark.parametrize("full_every", [1, 4])
def test_a_bad_full_set_is_never_loaded(tmp_path: Path, full_every: int) -> None:
    run = Run(tmp_path / "weights", full_every=full_every)
    folder = run.step()
    for fault in (
        lambda: flip_a_byte(folder / Manifest.read(folder).full_files[0]),
        lambda: (folder / Manifest.read(folder).full_files[0]).unlink(),
    ):
        fault()
        with pytest.raises(DamagedWeights, match=r"another checksum|cannot be read"):
            HeldWeights().load(folder)
        if full_every > 1:
            run.writer.mend()
            run.assert_loads(HeldWeights(), folder)
            run.writer._is_mended = False


def test_a_folder_that_is_not_there_is_another_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        HeldWeights().load(tmp_path)


def test_a_copy_that_went_wrong_is_noticed(run: Run) -> None:
    """For instance by a bug, or in memory. What changed later in that tensor does not hide it."""
    held = HeldWeights()
    run.assert_loads(held, run.step())
    held._tensors["embed"][0, 0] += 1
    run.weights["embed"][9, 9] += 1
    with pytest.raises(DamagedWeights, match="embed of version 2 has another checksum"):
        held.load(run.step())
    run.writer.mend()
    run.assert_loads(held, run.root / "weights-v2")


def test_digests_see_every_bit() -> None:
    zero, minus_zero = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    digests = {tensor_digest(tensor) for tensor in (zero, minus_zero, zero.view(2, 1), zero.bfloat16())}
    assert len(digests) == 4
    assert state_digest({"a": "1", "b": "2"}) == state_digest({"b": "2", "a": "1"})
    assert state_digest({"a": "1", "b": "2"}) != state_digest({"a": "2", "b": "1"})
    # The format depends on it: another release or another machine must compute the same.
    assert tensor_digest(zero) == "1f83910039d2e502d014e51d294de04d"


# The transport's part: which server reads what, and what happens if it cannot.


class FakeServer:
    """A server that reads published weights as a worker does."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.held = HeldWeights()
        self.num_loads = 0

    async def rpc(self, method: str, *, limit_s: float, folder: str) -> list[dict[str, str | None]]:
        assert method == "rpt_load_folder"
        self.num_loads += 1
        await asyncio.sleep(0)  # so that servers take turns
        try:
            self.weights = {name: tensor.clone() for name, tensor in self.held.load(Path(folder))}
        except DamagedWeights as error:
            return [{"damage": None}, {"damage": str(error)}]  # one of two workers found it
        return [{"damage": None}, {"damage": None}]


def make_transport(tmp_path: Path, **changes: Any) -> SharedFolderTransport:
    transport = SharedFolderTransport(str(tmp_path / "weights"), **changes)
    transport.open(Fleet([], key=None, timeout_s=1, request_timeout_s=1))
    return transport


def publish(transport: SharedFolderTransport, version: int, weights: dict[str, Tensor]) -> None:
    transport.publish(iter(weights.items()), version=version, dtype=torch.float32, shapes={})


def load(transport: SharedFolderTransport, servers: list[FakeServer]) -> list[Any]:
    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(transport.load(server) for server in servers), return_exceptions=True)

    return asyncio.run(all_at_once())


def test_all_weights_are_written_again_once_if_patches_are_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transport, servers = make_transport(tmp_path), [FakeServer("http://a"), FakeServer("http://b")]
    weights = {"a": torch.arange(600.0), "b": torch.ones(3)}
    publish(transport, 1, weights)
    assert load(transport, servers) == [None, None]
    weights = weights | {"a": weights["a"].clone().index_fill_(0, torch.tensor([7]), -1.0)}
    publish(transport, 2, weights)
    folder = tmp_path / "weights" / "weights-v2"
    flip_a_byte(delta(folder))
    assert load(transport, servers) == [None, None]
    # The second one may read before or after the first one has found the damage.
    assert all(server.num_loads in (2, 3) for server in servers)
    assert all(torch.equal(server.weights["a"], weights["a"]) for server in servers)
    assert "All weights are written again" in caplog.text
    assert "a of version 2 has another checksum" in caplog.text
    assert Manifest.read(folder).full_files == ("mended-00001.safetensors",)
    transport.retire()
    assert [path.name for path in folder.parent.iterdir()] == ["weights-v2"]
    transport.close()


@pytest.mark.parametrize(("full_every", "num_loads"), [(1, 1), (10, 2)])
def test_a_disk_that_stays_bad_loses_the_server_with_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_every: int, num_loads: int
) -> None:
    transport, server = make_transport(tmp_path, full_every=full_every), FakeServer("http://a")
    publish(transport, 1, {"a": torch.arange(600.0)})

    def damage() -> None:
        folder = tmp_path / "weights" / "weights-v1"
        flip_a_byte(folder / Manifest.read(folder).full_files[0])

    mend = FolderWriter.mend
    monkeypatch.setattr(FolderWriter, "mend", lambda writer: (mend(writer), damage()))
    damage()
    (error,) = load(transport, [server])
    assert isinstance(error, ServerLost)
    assert "http://a: the weights in transport.folder=" in str(error)
    assert "are damaged: " in str(error)
    assert "a of version 1 has another checksum" in str(error)
    assert server.num_loads == num_loads
    assert not hasattr(server, "weights")
    transport.close()


def test_another_rank_cannot_write_weights_again(tmp_path: Path) -> None:
    """It has no copy. The server stays out until the first rank's next update."""
    first = make_transport(tmp_path)
    publish(first, 1, {"a": torch.arange(600.0)})
    other, server = SharedFolderTransport(str(tmp_path / "weights")), FakeServer("http://a")
    other.follow(1)
    assert load(other, [server]) == [None]
    publish(first, 2, {"a": torch.arange(600.0).index_fill_(0, torch.tensor([7]), -1.0)})
    other.follow(2)
    flip_a_byte(delta(tmp_path / "weights" / "weights-v2"))
    (error,) = load(other, [server])
    assert isinstance(error, ServerLost)
    publish(first, 3, {"a": torch.arange(600.0).index_fill_(0, torch.tensor([7, 8]), -1.0)})
    assert load(first, [server]) == [None]  # its path leads through the damaged version
    assert server.weights["a"].eq(-1.0).nonzero().view(-1).tolist() == [7, 8]
    assert other.sent == type(other.sent)()
    first.close()
