"""The folders in which weights are published: how they describe themselves, and how a server reads them.

docs/weight-sync.md describes the format and its invariants. This module does not import vllm.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rpt_lightning.rollout.weight_sync.patch import Patch, apply_patch

FORMAT = 1
MANIFEST = "manifest.json"  # written last
GAPS, VALUES = "gaps:", "values:"  # how the names of a patch's two tensors begin


class DamagedWeights(ValueError):
    """Published weights are torn, corrupt or incomplete. A new full set would help."""


def tensor_digest(tensor: Tensor) -> str:
    """Return a 128-bit digest (XXH3, hex) of a CPU tensor's dtype, shape and bits.

    It finds accidents, not attacks. Unlike ``checksum`` it tells 0 from -0, and it is as fast as memory.
    """
    digest = xxhash.xxh3_128(repr((tensor.dtype, tuple(tensor.shape))).encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def state_digest(digests: Mapping[str, str]) -> str:
    """Return the digest of a whole set of weights, given those of its tensors by name."""
    return xxhash.xxh3_128(json.dumps(sorted(digests.items())).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Base:
    """The set of weights to which a version's patches apply: its state, its version and its folder."""

    state: str
    version: int
    folder: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a published folder holds.

    Attributes:
        version: The policy's version.
        state: ``state_digest`` of all its weights.
        base: The weights to which the patches apply. None if the folder has no patches.
        full_files: Names of the files with every tensor. None if the folder has no full set.
        patch_files: Names of the files with patches.
        is_base: Whether patches on these weights may follow, so that servers should keep them.
        digests: ``tensor_digest`` of each tensor that the folder holds, whole or as a patch.
        blocks: The block of each patch (``Patch.block``).
    """

    version: int
    state: str
    base: Base | None
    full_files: tuple[str, ...] | None
    patch_files: tuple[str, ...]
    is_base: bool
    digests: Mapping[str, str]
    blocks: Mapping[str, int]

    def write(self, folder: Path) -> None:
        """Write the manifest, after everything else. A reader finds the old one or the new one."""
        partial = folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps({"format": FORMAT} | asdict(self)))
        partial.replace(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            FileNotFoundError: There is none.
            DamagedWeights: It cannot be read.
        """
        text = (folder / MANIFEST).read_text()
        try:
            fields = json.loads(text)
            if fields.pop("format") != FORMAT:
                raise ValueError("another format")
            base, full = fields.pop("base"), fields.pop("full_files")
            return cls(
                base=base and Base(**base),
                full_files=None if full is None else tuple(full),
                patch_files=tuple(fields.pop("patch_files")),
                **fields,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedWeights(f"{folder / MANIFEST} is damaged ({error})") from error

    def as_base(self, folder: str) -> Base:
        """Return this version as the base of another one."""
        return Base(state=self.state, version=self.version, folder=folder)

    def applies_to(self, state: str | None) -> bool:
        """Whether the patches apply to weights of this state."""
        return self.base is not None and self.base.state == state


class HeldWeights:
    """A server's own copy of the weights in host memory, to which it applies patches.

    Patches need the old values, and an engine may hold them packed for its kernels. The copy takes as much
    memory as the weights in the engine's dtype.
    """

    def __init__(self) -> None:
        self.state: str | None = None
        """State of the weights, or None if there are none."""
        self._tensors: dict[str, Tensor] = {}
        self._digests: dict[str, str] = {}

    def load(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Bring the copy to the weights that are published in a folder, and return all of them.

        Reads the patches if the copy holds their base, goes back to the bases that it lacks, and reads a full
        set if there is no other way. Everything that is read is compared with its digest before this returns,
        because vLLM cannot give up a load half way. If no patches may follow, nothing is kept, and the
        tensors are read once more while they are used.

        Raises:
            FileNotFoundError: The folder has no manifest.
            DamagedWeights: What is published does not give the weights that it should.
        """
        path = self._path_to(folder)
        state, self.state = self.state, None  # until all is well again
        try:
            for at, manifest in path:
                if manifest.full_files is not None and not manifest.applies_to(state):
                    self._tensors, self._digests = {}, {}  # before new ones take memory
                    for name, tensor in _read(at, manifest.full_files):
                        self._check(at, name, tensor, manifest)
                        if manifest.is_base:
                            self._tensors[name] = tensor.clone()  # the file may go
                else:
                    self._apply(at, manifest)
                state = state_digest(self._digests)
                if state != manifest.state:
                    raise DamagedWeights(f"{at}: version {manifest.version} is incomplete")
        except BaseException:
            self._tensors, self._digests = {}, {}
            raise
        if not self._tensors:
            return _read(folder, path[-1][1].full_files or ())
        self.state = state
        return iter(self._tensors.items())

    def _path_to(self, folder: Path) -> list[tuple[Path, Manifest]]:
        """Return the folders to read, in order, to get from the copy to the weights in ``folder``."""
        path: list[tuple[Path, Manifest]] = []
        manifest = Manifest.read(folder)
        while manifest.state != self.state:
            path.append((folder, manifest))
            base = manifest.base
            if manifest.applies_to(self.state) or manifest.full_files is not None:
                break
            if base is None or base.version >= manifest.version:
                raise DamagedWeights(f"{folder} has neither all weights nor an earlier version to apply to")
            folder = folder.with_name(base.folder)
            try:
                manifest = Manifest.read(folder)
            except FileNotFoundError as error:
                raise DamagedWeights(f"{folder}, the base of version {base.version + 1}, is gone") from error
            if manifest.state != base.state:
                raise DamagedWeights(f"{folder} does not hold the base that the next version names")
        return path[::-1]

    def _apply(self, folder: Path, manifest: Manifest) -> None:
        values: dict[str, Tensor] = {}
        gaps: dict[str, Tensor] = {}
        for name, tensor in _read(folder, manifest.patch_files):
            (gaps if name.startswith(GAPS) else values)[name.partition(":")[2]] = tensor
            name = name.partition(":")[2]
            if name not in gaps or name not in values:
                continue
            try:
                apply_patch(
                    self._tensors[name], Patch(manifest.blocks[name], gaps.pop(name), values.pop(name))
                )
            except (KeyError, ValueError) as error:
                raise DamagedWeights(f"{folder}: the patch of {name} cannot be applied ({error})") from error
            self._check(folder, name, self._tensors[name], manifest)

    def _check(self, folder: Path, name: str, tensor: Tensor, manifest: Manifest) -> None:
        self._digests[name] = tensor_digest(tensor)
        if manifest.digests.get(name) != self._digests[name]:
            raise DamagedWeights(f"{folder}: {name} of version {manifest.version} has another checksum")


def _read(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of some safetensors files."""
    for file in (folder / name for name in names):
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is not iterable)
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DamagedWeights(f"{file} cannot be read ({error})") from error
