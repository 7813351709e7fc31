"""A rank that dies ends the others: with its name and, where it could say one, its error.

Collectives only time out, after half an hour by default and with the name of the collective; with NCCL the process cannot be woken from them. So every
rank tells a small shared counter that it lives, and a thread of its own watches.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

STATUS_LOST_RANK = 1
_NEWS = "news"


class RankWatch(Callback):
    """Ends this process within a minute after another rank has died, hung as a whole process, or ended with an error.

    Args:
        limit_s: Seconds without a sign of life after which a rank counts as dead. 0 turns the watch off.
    """

    def __init__(self, limit_s: float = 40.0) -> None:
        if limit_s < 0 or 0 < limit_s < 5:
            raise ValueError(f"ranks.limit_s={limit_s}: give 5 seconds or more, or 0 for no watch")
        self.limit_s = limit_s
        self._watch: _Watch | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1 and self.limit_s:
            # A name of its own for each start: torchrun's store may outlive the ranks, and each of its nodes counts restarts by itself.
            name = trainer.strategy.broadcast(f"rank-watch-{secrets.token_hex(8)}")
            self._watch = _Watch(name, trainer.global_rank, trainer.world_size, self.limit_s)
            self._watch.start()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            self._watch.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._watch is None:
            return
        if is_lost_connection(exception):
            # The error names an address at best: the watch finds out which rank it was, says so and ends the process.
            print(
                f"rpt: a connection between ranks broke ({str(exception)[:120]}): looking for the rank that is gone",
                file=sys.stderr,
                flush=True,
            )
            self._watch.join(self.limit_s * 1.5)
        elif not isinstance(exception, (SystemExit, KeyboardInterrupt)):  # those end every rank
            self._watch.tell(f"ended with {type(exception).__name__}: {exception}")
            if is_lightnings_child(trainer):
                self._watch.stop()  # it would end this process before the traceback is kept
                _wait_for_the_end_of(os.getppid(), limit_s=self.limit_s)
        self._watch.stop()


def is_lost_connection(error: BaseException) -> bool:
    """A collective that failed, mostly because another rank is gone. gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def is_lightnings_child(trainer: Trainer) -> bool:
    """Whether Lightning's launcher started this process: it kills the first one, without a word, as soon as one of those that it started ends with an error."""
    return (
        isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
        and trainer.local_rank > 0
    )


def _wait_for_the_end_of(parent: int, *, limit_s: float) -> None:
    """The first process has heard the news, says them and ends with an error of its own."""
    end = time.monotonic() + limit_s
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.1)


class _Watch(threading.Thread):
    """Judges by what `_Signs` last saw, and ends the process; it never waits for the store itself, which may hang with the process that keeps it."""

    def __init__(self, name: str, rank: int, num_ranks: int, limit_s: float) -> None:
        super().__init__(daemon=True, name="rank-watch")
        self.rank = rank
        self.limit_s = limit_s
        self.period_s = limit_s / 10
        self._stopped = threading.Event()
        self._signs = _Signs(name, rank, num_ranks, limit_s, self._stopped)

    def tell(self, what: str) -> None:
        """To all ranks, of this one."""
        self._signs.tell(f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()}) {what}")

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        self._signs.start()
        while not self._stopped.wait(self.period_s):
            now = time.monotonic()
            silences = {rank: now - seen_s for rank, seen_s in self._signs.seen_s.items()}
            lost = [rank for rank, silence in silences.items() if silence > self.limit_s]
            if self._signs.news is not None:
                self._leave(self._signs.news)
            elif (silence := now - self._signs.answered_s) > self.limit_s:
                self._leave(
                    f"rank 0, which keeps the ranks together, has not answered for {silence:.0f} s ({self._limit}): its process is dead or hangs"
                )
            elif lost:
                news = f"rank {lost[0]} has given no sign of life for {silences[lost[0]]:.0f} s ({self._limit}): its process is dead or hangs"
                threading.Thread(
                    target=self._signs.tell, args=(news,), daemon=True
                ).start()  # the store may hang with the rank that is lost
                self._leave(news)

    @property
    def _limit(self) -> str:
        return f"ranks.limit_s={self.limit_s:g}"

    def _leave(self, news: str) -> None:
        # A rank that is about to end by itself, with the same error or because all is done, may do so.
        if self._stopped.wait(self.period_s * 2):
            return
        print(
            f"rpt: error: {news}. Rank {self.rank} ends too; continue with --ckpt_path last",
            file=sys.stderr,
            flush=True,
        )
        os._exit(
            STATUS_LOST_RANK
        )  # the main thread may hang in a collective, from which no exception wakes it


class _Signs(threading.Thread):
    """Signs of life, given and seen. The first rank looks at all counters, the others at the first rank's and at the news: the number of requests grows
    only with the number of ranks.

    The counters are kept by the store at which the ranks met (in the first rank's process, or torchrun's), over a connection of our own: that of
    torch is locked while it waits. A request to a store whose process hangs is never answered.
    """

    def __init__(
        self, name: str, rank: int, num_ranks: int, limit_s: float, stopped: threading.Event
    ) -> None:
        super().__init__(daemon=True, name="rank-signs")
        self.news: str | None = None
        self.answered_s = time.monotonic()
        self.seen_s = dict.fromkeys(range(num_ranks) if rank == 0 else (0,), self.answered_s)
        self._rank = rank
        self._period_s = limit_s / 10
        self._stopped = stopped
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=limit_s))
        self._store: Any = PrefixStore(name, store)

    def tell(self, news: str) -> None:
        """The first news stay."""
        try:
            self._store.compare_set(_NEWS, "", news)
        except dist.DistError:
            return  # the rank that keeps the news is gone, which the others see as well

    def run(self) -> None:
        beats = dict.fromkeys(self.seen_s, 0)
        while not self._stopped.wait(self._period_s):
            try:
                self._store.add(f"beat-{self._rank}", 1)
                for rank in beats:
                    if (beat := self._store.add(f"beat-{rank}", 0)) != beats[rank]:
                        beats[rank], self.seen_s[rank] = beat, time.monotonic()
                if self._store.check([_NEWS]):
                    self.news = self._store.get(_NEWS).decode()
            except dist.DistError as error:
                self.news = f"rank 0, which keeps the ranks together, cannot be reached any more ({type(error).__name__}): its process is dead"
                return
            self.answered_s = time.monotonic()
