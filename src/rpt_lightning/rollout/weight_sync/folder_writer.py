"""Write versions of the weights into a shared folder: what changed since the last one, or all of them.

published_folder.py describes and reads the folders, and docs/weight-sync.md says why they are as they are.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rpt_lightning.rollout.weight_sync.patch import find_changes, make_patch
from rpt_lightning.rollout.weight_sync.published_folder import (
    GAPS,
    VALUES,
    Manifest,
    state_digest,
    tensor_digest,
)
from rpt_lightning.rollout.weight_sync.sent_weights import SentWeights

# Patches are written if they take less than this share of all weights.
WORTHWHILE = 0.5


def folder_name(version: int) -> str:
    """Return the name of a version's folder."""
    return f"weights-v{version}"


class FolderWriter:
    """The first rank's side of a shared folder.

    Args:
        root: The shared folder.
        shard_bytes: Size of a file, in bytes.
        full_every: A full set is written every this many versions. 1: always, and no copy is kept.
    """

    def __init__(self, root: Path, *, shard_bytes: int, full_every: int) -> None:
        self._root = root
        self._shard_bytes = shard_bytes
        self._full_every = full_every
        self._copy: dict[str, Tensor] = {}  # the last version, in the servers' dtype
        self._digests: dict[str, str] = {}  # of these
        self._chain: list[Manifest] = []  # a full set, and the versions after it that apply to each other
        self._patch_share = 0.0  # size of the last version's patches, divided by that of all weights
        self._is_mended = False
        self.sent = SentWeights()

    @property
    def needed(self) -> tuple[Path, ...]:
        """Folders that a server needs to get the latest version, whatever it holds."""
        return tuple(self._folder(manifest.version) for manifest in self._chain)

    def write(self, weights: Iterable[tuple[str, Tensor]], *, version: int, dtype: torch.dtype) -> Path:
        """Write a version and return its folder. A server never sees half of one.

        Raises:
            OSError: The folder cannot be written, for instance because the disk is full. The next version is
                then a full set.
        """
        chain, self._chain = self._chain, []  # until this version is complete
        base = chain[-1] if self._full_every > 1 and chain and chain[-1].version < version else None
        if self._patch_share >= WORTHWHILE:
            base = None
        is_full = base is None or len(chain) >= self._full_every
        with self._new_folder(version) as folder:
            files = _VersionFiles(folder, self._shard_bytes, has_patches=base is not None, is_full=is_full)
            for name, tensor in weights:
                # A copy, because a tied head shares memory, which safetensors refuses.
                new = tensor.detach().to("cpu", dtype, copy=True).contiguous()
                if files.add(name, new, old=self._copy.get(name), digest=self._digests.get(name)):
                    self._digests[name] = files.digests[name]
                    if self._full_every > 1:
                        self._copy[name] = new
            files.close()
            manifest = Manifest(
                version=version,
                state=state_digest(self._digests),
                base=None if base is None else base.as_base(folder_name(base.version)),
                full_files=files.full_names,
                patch_files=files.patch_names,
                is_base=self._full_every > 1,
                digests=files.digests,
                blocks=files.blocks,
            )
            manifest.write(folder)
        self._chain = [manifest] if is_full else [*chain, manifest]
        self._patch_share = files.patch_share if chain else 0.0
        self._is_mended = False
        self.sent = files.sent
        return self._folder(version)

    def mend(self) -> None:
        """Add a full set from the copy to the latest version, and say that it has no other files.

        Servers that read the other files at this moment may do so. Does nothing the second time.
        """
        if self._is_mended:
            return
        latest = self._chain[-1]
        folder = self._folder(latest.version)
        folder.mkdir(exist_ok=True)
        files = _VersionFiles(folder, self._shard_bytes, has_patches=False, is_full=True, full_kind="mended")
        for name, tensor in self._copy.items():
            files.add(name, tensor, old=tensor, digest=self._digests[name])
        files.close()
        manifest = replace(
            latest, base=None, full_files=files.full_names, patch_files=(), digests=files.digests, blocks={}
        )
        manifest.write(folder)
        self._chain, self._is_mended = [manifest], True

    def _folder(self, version: int) -> Path:
        return self._root / folder_name(version)

    @contextlib.contextmanager
    def _new_folder(self, version: int) -> Iterator[Path]:
        """Yield a folder to fill. It gets its name if that succeeds, and is removed otherwise."""
        target = self._folder(version)
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            if target.exists():  # after a failed update
                shutil.rmtree(target)
            partial.rename(target)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise OSError(
                    f"transport.folder={self._root}: weights of version {version} could not be written: "
                    f"{error}"
                ) from error
            raise


class _VersionFiles:
    """The files of one version, and what they hold."""

    def __init__(
        self,
        folder: Path,
        shard_bytes: int,
        *,
        has_patches: bool,
        is_full: bool,
        full_kind: str = "model",
    ) -> None:
        self.digests: dict[str, str] = {}
        self.blocks: dict[str, int] = {}
        self._has_patches = has_patches
        self._is_full = is_full
        self._delta = _Shards(folder, "delta", shard_bytes)
        self._full = _Shards(folder, full_kind, shard_bytes)
        self._num_entries = self._num_changed = 0
        self._weight_bytes = self._patch_bytes = 0

    def add(self, name: str, new: Tensor, *, old: Tensor | None, digest: str | None) -> bool:
        """Add a tensor, and return whether it differs from the old one, whose digest is given."""
        self._num_entries += new.numel()
        self._weight_bytes += new.nbytes
        if old is None or digest is None:
            has_changed, num_changed, num_bytes = True, new.numel(), new.nbytes
        elif old is new:
            has_changed, num_changed, num_bytes = False, 0, 0
        else:
            changes = find_changes(old, new)
            has_changed, num_changed = changes.num_changed > 0, changes.num_changed
            num_bytes = changes.num_bytes
            if self._has_patches and has_changed:
                patch = make_patch(new, changes)
                self.blocks[name] = patch.block
                self._delta.add({GAPS + name: patch.gaps, VALUES + name: patch.values})
        self._num_changed += num_changed
        self._patch_bytes += num_bytes
        if has_changed:
            self.digests[name] = tensor_digest(new)
        elif self._is_full:
            assert digest is not None
            self.digests[name] = digest
        if self._is_full:
            self._full.add({name: new})
        return has_changed

    def close(self) -> None:
        """Write what is not on disk yet."""
        self._delta.write()
        self._full.write()

    @property
    def full_names(self) -> tuple[str, ...] | None:
        """Names of the files with a full set."""
        return tuple(self._full.names) if self._is_full else None

    @property
    def patch_names(self) -> tuple[str, ...]:
        """Names of the files with patches."""
        return tuple(self._delta.names)

    @property
    def patch_share(self) -> float:
        """Size of the patches, written or not, as a share of the weights."""
        return self._patch_bytes / max(self._weight_bytes, 1)

    @property
    def sent(self) -> SentWeights:
        return SentWeights(
            num_bytes=self._delta.num_bytes if self._has_patches else self._full.num_bytes,
            num_full_bytes=self._full.num_bytes,
            changed_frac=self._num_changed / max(self._num_entries, 1),
        )


class _Shards:
    """Safetensors files of about the same size."""

    def __init__(self, folder: Path, kind: str, shard_bytes: int) -> None:
        self._folder = folder
        self._kind = kind
        self._shard_bytes = shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self.names: list[str] = []
        self.num_bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Add tensors, which end up in the same file."""
        self._shard |= tensors
        self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._pending_bytes >= self._shard_bytes:
            self.write()

    def write(self) -> None:
        """Write what was added since the last file."""
        if not self._shard:
            return
        self.names.append(f"{self._kind}-{len(self.names) + 1:05}.safetensors")
        try:
            save_file(self._shard, self._folder / self.names[-1])
        except Exception as error:  # safetensors has its own class for a full disk
            raise OSError(str(error)) from error
        self.num_bytes += self._pending_bytes
        self._shard, self._pending_bytes = {}, 0
