"""The schedule of faults. It is a function of the seed, so that a soak can be repeated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SERVER_FAULTS = ("kill server", "kill engine", "hang server", "kill all servers")
TRAINER_FAULTS = (
    "kill rank",
    "kill trainer",
    "sigterm rank",
    "sigterm all",
    "wrong weights",
    "damaged checkpoint",
    "full disk",
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One scheduled fault. ``draw``, a number from 0 to 1, chooses the victim and the changed byte."""

    at_s: float
    kind: str
    draw: float


def make_schedule(
    *, seed: int, duration_s: float, every_s: float, leave_out: Sequence[str] = ()
) -> list[Fault]:
    """Schedule a fault every ``every_s`` seconds, or up to a fifth of that time earlier.

    In the first third only servers suffer faults, so that one trainer lives long enough to reveal a leak.
    After that every kind of fault occurs equally often.
    """
    rng = random.Random(seed)
    bags: dict[bool, list[str]] = {True: [], False: []}
    faults = []
    for number in range(1, int(duration_s / every_s)):
        only_servers = number * every_s <= duration_s / 3
        if not bags[only_servers]:
            kinds = [
                kind
                for kind in (*SERVER_FAULTS, *(() if only_servers else TRAINER_FAULTS))
                if kind not in leave_out
            ]
            bags[only_servers] = rng.sample(kinds, len(kinds))
        at_s = number * every_s - rng.uniform(0, every_s / 5)
        faults.append(Fault(at_s=at_s, kind=bags[only_servers].pop(), draw=rng.random()))
    return faults
