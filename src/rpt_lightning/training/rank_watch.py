"""A rank that dies ends the others: with its name and, where it could say one, its error.

Collectives only time out, after half an hour by default and with the name of the collective; with NCCL the process cannot be woken from them. So every
rank tells a small shared counter that it lives, and a thread of its own watches.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
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
            self._watch = _Watch(trainer.global_rank, trainer.world_size, self.limit_s)
            self._watch.start()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            self._watch.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._watch is None:
            return
        if is_lost_connection(exception):
            # The error names an address at best: the watch finds out which rank it was, says so and ends the process.
            print(f"rpt: a connection between ranks broke ({str(exception)[:120]}): looking for the rank that is gone", file=sys.stderr, flush=True)
            self._watch.join(self.limit_s * 1.5)
        elif not isinstance(exception, (SystemExit, KeyboardInterrupt)):  # those end every rank
            self._watch.tell(f"ended with {type(exception).__name__}: {exception}")
        self._watch.stop()


def is_lost_connection(error: BaseException) -> bool:
    """A collective that failed, mostly because another rank is gone. gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class _Watch(threading.Thread):
    """The first rank looks at all counters, the others at the first rank's and at the news: the number of requests grows only with the number of ranks.

    The counters are kept by the store at which the ranks met (in the first rank's process, or torchrun's), over a connection of our own: that of
    torch is locked while it waits.
    """

    def __init__(self, rank: int, num_ranks: int, limit_s: float) -> None:
        super().__init__(daemon=True, name="rank-watch")
        self.rank = rank
        self.num_ranks = num_ranks
        self.limit_s = limit_s
        self.period_s = limit_s / 10
        self._stopped = threading.Event()
        self._store = self._connect()

    def _connect(self) -> Any:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self.limit_s))
        # torchrun's store outlives a restart of the ranks.
        return PrefixStore(f"rank-watch-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def tell(self, what: str) -> None:
        """To all ranks, of this one. The first news stay."""
        try:
            self._store.compare_set(_NEWS, "", f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()}) {what}")
        except dist.DistError:
            return  # the rank that keeps the news is gone, which the others see as well

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        watched = range(self.num_ranks) if self.rank == 0 else (0,)
        beats = dict.fromkeys(watched, 0)
        seen_s = dict.fromkeys(watched, time.monotonic())
        while not self._stopped.wait(self.period_s):
            try:
                self._store.add(f"beat-{self.rank}", 1)
                if self._store.check([_NEWS]):
                    self._leave(self._store.get(_NEWS).decode())
                now = time.monotonic()
                for rank in watched:
                    if (beat := self._store.add(f"beat-{rank}", 0)) != beats[rank]:
                        beats[rank], seen_s[rank] = beat, now
                for rank in watched:
                    if now - seen_s[rank] > self.limit_s:
                        news = f"rank {rank} has given no sign of life for {now - seen_s[rank]:.0f} s (ranks.limit_s={self.limit_s:g}): its process is dead or hangs"
                        self._store.compare_set(_NEWS, "", news)
                        self._leave(news)
            except dist.DistError as error:
                self._leave(f"rank 0, which keeps the ranks together, cannot be reached any more ({type(error).__name__}): its process is dead")

    def _leave(self, news: str) -> None:
        # A rank that is about to end by itself, with the same error or because all is done, may do so.
        if self._stopped.wait(self.period_s * 2):
            return
        print(f"rpt: error: {news}. Rank {self.rank} ends too; continue with --ckpt_path last", file=sys.stderr, flush=True)
        os._exit(STATUS_LOST_RANK)  # the main thread may hang in a collective, from which no exception wakes it
