"""Transports that bring new weights from the trainer to its servers."""

from __future__ import annotations

import fcntl
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save_file
from torch import Tensor

from rpt_lightning.rollout.servers.server import Fleet, Server


class WeightTransport(ABC):
    """A way to send weights to servers.

    The first rank uses all methods except ``follow``. The others use only ``follow`` and ``load``. An update
    calls ``publish`` once, then ``load`` for every server that answers, then ``retire``.
    """

    @abstractmethod
    def open(self, fleet: Fleet) -> None:
        """Prepare for updates. Called before the first one."""

    @abstractmethod
    def publish(
        self,
        weights: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        dtype: torch.dtype,
        shapes: Mapping[str, torch.Size],
    ) -> None:
        """Take every tensor and offer it in the servers' dtype.

        The names are Hugging Face names. A tied head comes under its own name too.
        """

    @abstractmethod
    def follow(self, version: int) -> None:
        """Note on the other ranks that the first rank has published this version, so they may ``load`` it."""

    @abstractmethod
    async def load(self, server: Server) -> None:
        """Load the latest published weights into a server that is on hold. Raise ServerLost if that fails."""

    @abstractmethod
    def retire(self) -> None:
        """Discard everything published before the latest version."""

    @abstractmethod
    def close(self) -> None:
        """Clean up everything. It may be called twice."""


class SharedFolderTransport(WeightTransport):
    """Weight sync through safetensors files in a folder.

    The trainer and the servers must see the folder under the same path, on a local disk or a network file
    system. A server that lost its weights can load them again without the trainer's help.

    Args:
        folder: Folder for this run only. Files from an earlier start are removed. A second run that uses the
            folder while the first is alive is refused.
        shard_gib: Size of a file, in GiB. Weights on their way to disk occupy this much memory.
        load_timeout_s: Longest time for a server to load the weights, in seconds.
    """

    def __init__(self, folder: str, shard_gib: float = 4.0, load_timeout_s: float = 600.0) -> None:
        if shard_gib <= 0:
            raise ValueError(f"transport.shard_gib={shard_gib} must be positive")
        self.folder = folder
        self.shard_gib = shard_gib
        self.load_timeout_s = load_timeout_s
        self._published: Path | None = None
        self._root = Path(folder).absolute()
        self._lock: IO[str] | None = None

    def open(self, fleet: Fleet) -> None:
        """Raise ValueError if another run uses the folder. Each would remove or load the other's weights."""
        self._root.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            lock = self._root.with_name(self._root.name + ".lock").open("w")
            try:
                # Held until this process ends, however it ends.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.close()
                raise ValueError(
                    f"transport.folder={self.folder}: another run uses this folder for its weights. Give "
                    "each run a folder of its own (--rollout.engine.transport.folder), and servers of its own"
                ) from error
            self._lock = lock
        self._remove_all_but(None)

    def publish(
        self,
        weights: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        dtype: torch.dtype,
        shapes: Mapping[str, torch.Size],
    ) -> None:
        target = self._folder_of(version)
        partial = target.with_suffix(".partial")
        for path in (target, partial):
            if path.exists():  # after a failed update, the same version is published again
                shutil.rmtree(path)
        partial.mkdir()
        shard: dict[str, Tensor] = {}
        num_bytes = num_files = 0

        def write() -> None:
            nonlocal num_bytes, num_files
            num_files += 1
            try:
                save_file(shard, partial / f"model-{num_files:05}.safetensors")
            except Exception as error:  # safetensors has its own class for a full disk
                shutil.rmtree(partial, ignore_errors=True)
                raise OSError(
                    f"transport.folder={self.folder}: weights of version "
                    f"{version} could not be written: {error}"
                ) from error
            shard.clear()
            num_bytes = 0

        for name, tensor in weights:
            # A copy, because a tied head shares memory, which safetensors refuses.
            shard[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
            num_bytes += shard[name].nbytes
            if num_bytes >= self.shard_gib * 2**30:
                write()
        if shard:
            write()
        partial.rename(target)  # a server never sees half a folder
        self._published = target

    def follow(self, version: int) -> None:
        self._published = self._folder_of(version)

    async def load(self, server: Server) -> None:
        assert self._published is not None
        await server.rpc("rpt_load_folder", limit_s=self.load_timeout_s, folder=str(self._published))

    def retire(self) -> None:
        self._remove_all_but(self._published)

    def close(self) -> None:
        if self._published is not None:
            self._published = None
            self._remove_all_but(None)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _folder_of(self, version: int) -> Path:
        return self._root / f"weights-v{version}"

    def _remove_all_but(self, kept: Path | None) -> None:
        for path in self._root.iterdir():
            if path != kept and re.fullmatch(r"weights-v\d+(\.partial)?", path.name):
                shutil.rmtree(path, ignore_errors=True)
