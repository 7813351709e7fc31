"""Transports that bring new weights from the trainer to its servers."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import re
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from rpt_lightning.rollout.servers.server import Fleet, Server, ServerLost
from rpt_lightning.rollout.weight_sync.folder_writer import FolderWriter, folder_name
from rpt_lightning.rollout.weight_sync.sent_weights import SentWeights

log = logging.getLogger(__name__)


class WeightTransport(ABC):
    """A way to send weights to servers.

    The first rank uses all methods except ``follow``. The others use only ``follow`` and ``load``. An update
    calls ``publish`` once, then ``load`` for every server that answers, then ``retire``.
    """

    @property
    def sent(self) -> SentWeights | None:
        """What the latest update sent. None if the transport does not count it."""
        return None

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

    Only what changed since the last version is written, bit for bit, if that is smaller than half of the
    weights (docs/weight-sync.md). For this, the first rank and every worker of a server keep a copy of the
    weights in host memory, in the engine's dtype.

    Args:
        folder: Folder for this run only. Files from an earlier start are removed. A second run that uses the
            folder while the first is alive is refused.
        shard_gib: Size of a file, in GiB. Weights on their way to disk occupy this much memory.
        load_timeout_s: Longest time for a server to load the weights, in seconds.
        full_every: All weights are written every this many versions, beside what changed, for servers that
            come late. 1 writes all weights in every version and nothing else, and no copies are kept.
    """

    def __init__(
        self, folder: str, shard_gib: float = 4.0, load_timeout_s: float = 600.0, full_every: int = 10
    ) -> None:
        if shard_gib <= 0:
            raise ValueError(f"transport.shard_gib={shard_gib} must be positive")
        if full_every < 1:
            raise ValueError(
                f"transport.full_every={full_every} must be at least 1, which writes all weights every time"
            )
        self.folder = folder
        self.shard_gib = shard_gib
        self.load_timeout_s = load_timeout_s
        self.full_every = full_every
        self._published: Path | None = None
        self._root = Path(folder).absolute()
        self._lock: IO[str] | None = None
        self._writer: FolderWriter | None = None  # on the first rank
        self._mending = threading.Lock()

    @property
    def sent(self) -> SentWeights | None:
        return SentWeights() if self._writer is None else self._writer.sent

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
        self._remove_all_but(())
        self._writer = FolderWriter(
            self._root, shard_bytes=int(self.shard_gib * 2**30), full_every=self.full_every
        )

    def publish(
        self,
        weights: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        dtype: torch.dtype,
        shapes: Mapping[str, torch.Size],
    ) -> None:
        assert self._writer is not None
        self._published = self._writer.write(weights, version=version, dtype=dtype)

    def follow(self, version: int) -> None:
        self._published = self._folder_of(version)

    async def load(self, server: Server) -> None:
        damage = await self._load(server)
        if damage is not None and self._writer is not None and self.full_every > 1:
            log.warning(
                "%s could not use the published weights: %s. All weights are written again",
                server.url,
                damage,
            )
            await asyncio.to_thread(self._mend)
            damage = await self._load(server)
        if damage is not None:
            raise ServerLost(
                f"{server.url}: the weights in transport.folder={self.folder} are damaged: {damage}. Check "
                "the disk and its network"
            )

    async def _load(self, server: Server) -> str | None:
        """Return what is wrong with the published weights."""
        assert self._published is not None
        answers = await server.rpc(
            "rpt_load_folder", limit_s=self.load_timeout_s, folder=str(self._published)
        )
        return next((str(answer["damage"]) for answer in answers if answer["damage"] is not None), None)

    def _mend(self) -> None:
        """Write all weights in place of a damaged folder, once a version, from the first rank's copy."""
        assert self._writer is not None
        with self._mending:
            self._writer.mend()

    def retire(self) -> None:
        self._remove_all_but(() if self._writer is None else self._writer.needed)

    def close(self) -> None:
        if self._published is not None:
            self._published = None
            self._remove_all_but(())
        self._writer = None
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _folder_of(self, version: int) -> Path:
        return self._root / folder_name(version)

    def _remove_all_but(self, kept: Collection[Path]) -> None:
        for path in self._root.iterdir():
            if path not in kept and re.fullmatch(r"weights-v\d+(\.partial)?", path.name):
                shutil.rmtree(path, ignore_errors=True)
