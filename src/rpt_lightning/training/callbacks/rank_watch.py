"""Ends all ranks when one rank dies, and says which one and, if possible, with which error.

Collectives only time out, after half an hour by default, and then name the collective. With NCCL nothing can
wake the process from them. So every rank increments a small shared counter to show that it is alive, and a
separate thread watches the counters.
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

from rpt_lightning.compat.lightning import cluster_environment
from rpt_lightning.compat.torch import is_lost_connection

STATUS_LOST_RANK = 1
_NEWS = "news"


class RankWatch(Callback):
    """Ends this process within a minute after another rank is lost.

    A rank is lost if it has died, hung as a whole process, or ended with an error.

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
            # Each start has a name of its own. torchrun's store may outlive the ranks, and each of its nodes
            # counts restarts separately.
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
            # The error names an address at best. The watch finds out which rank it was, reports it and ends
            # the process.
            print(
                f"rpt: a connection between ranks broke ({str(exception)[:120]}): "
                "looking for the rank that is gone",
                file=sys.stderr,
                flush=True,
            )
            self._watch.join(self.limit_s * 1.5)
        elif not isinstance(exception, (SystemExit, KeyboardInterrupt)):  # these end every rank
            self._watch.tell(f"ended with {type(exception).__name__}: {exception}")
            if is_lightnings_child(trainer):
                self._watch.stop()  # it would end this process before the traceback is kept
                _wait_for_the_end_of(os.getppid(), limit_s=self.limit_s)
        self._watch.stop()


def is_lightnings_child(trainer: Trainer) -> bool:
    """Whether Lightning's launcher started this process.

    Once such a process ends with an error, the launcher kills the first process without a message.
    """
    return isinstance(cluster_environment(trainer), LightningEnvironment) and trainer.local_rank > 0


def _wait_for_the_end_of(parent: int, *, limit_s: float) -> None:
    """Wait until the first process has ended. It reports the news and ends with an error of its own."""
    end = time.monotonic() + limit_s
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.1)


class _Watch(threading.Thread):
    """Judges what `_Signs` last saw, and ends the process.

    It never waits for the store itself, which may hang together with the process that keeps it.
    """

    def __init__(self, name: str, rank: int, num_ranks: int, limit_s: float) -> None:
        super().__init__(daemon=True, name="rank-watch")
        self.rank = rank
        self.limit_s = limit_s
        self.period_s = limit_s / 10
        self._stopped = threading.Event()
        self._signs = _Signs(name, rank, num_ranks, limit_s, self._stopped)

    def tell(self, what: str) -> None:
        """Tell all ranks something about this one."""
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
                    f"rank 0, which keeps the ranks together, has not answered for {silence:.0f} s "
                    f"({self._limit}): its process is dead or hangs"
                )
            elif lost:
                news = (
                    f"rank {lost[0]} has given no sign of life for {silences[lost[0]]:.0f} s "
                    f"({self._limit}): its process is dead or hangs"
                )
                # In a thread, since the store may hang with the lost rank.
                threading.Thread(target=self._signs.tell, args=(news,), daemon=True).start()
                self._leave(news)

    @property
    def _limit(self) -> str:
        return f"ranks.limit_s={self.limit_s:g}"

    def _leave(self, news: str) -> None:
        # A rank that is about to end by itself, with the same error or because it is done, may do so.
        if self._stopped.wait(self.period_s * 2):
            return
        print(
            f"rpt: error: {news}. Rank {self.rank} ends too; continue with --ckpt_path last",
            file=sys.stderr,
            flush=True,
        )
        # The main thread may hang in a collective, from which no exception wakes it.
        os._exit(STATUS_LOST_RANK)


class _Signs(threading.Thread):
    """Gives signs of life and watches those of other ranks.

    The first rank reads all counters. The others read only the first rank's counter and the news, so the
    number of requests grows only linearly with the number of ranks.

    The store at which the ranks met keeps the counters (in the first rank's process, or torchrun's). The
    connection to it is our own, since torch's connection is locked while it waits. A request to a store whose
    process hangs is never answered.
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
        """Publish news. Only the first news is kept."""
        try:
            self._store.compare_set(_NEWS, "", news)
        except dist.DistError:
            return  # the rank that keeps the news is gone, and the others notice that as well

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
                self.news = (
                    "rank 0, which keeps the ranks together, cannot be reached any more "
                    f"({type(error).__name__}): its process is dead"
                )
                return
            self.answered_s = time.monotonic()
