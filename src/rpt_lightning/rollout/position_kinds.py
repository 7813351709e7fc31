"""Learns which kinds of positions have given groups with a gradient, and prefers them.

A kind is a cell of two bands: the policy's probability of the truth without a thought, and its entropy
there. For each kind k, n_k groups were rolled out and g_k of them had a gradient. Both counts are multiplied
by ``decay`` before each step's are added, so that they follow the policy. With the overall share s = sum g /
sum n, the share of a kind is smoothed towards it:

    share_k = (g_k + PRIOR s) / (n_k + PRIOR)

A task of kind k is accepted with probability

    max(floor, share_k / max_j share_j)

So the best kind is always accepted, others in proportion to their shares, and none starves. A kind that
nobody has seen has the overall share.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

# Upper ends of the bands, which belong to the next band. The last band has none.
PROB_EDGES = (0.01, 0.05, 0.2, 0.5, 0.8)
ENTROPY_EDGES = (1.0, 2.0, 3.0)  # nats
PRIOR = 4.0  # groups with the overall share that count for every kind


def num_kinds() -> int:
    """Return the number of kinds."""
    return (len(PROB_EDGES) + 1) * (len(ENTROPY_EDGES) + 1)


def kind_of(true_prob: float, entropy: float) -> int:
    """Return the number of a kind, from 0 on.

    Args:
        true_prob: The policy's probability of the truth.
        entropy: The policy's entropy there, in nats.

    >>> kind_of(0.001, 0.3), kind_of(0.001, 1.0), kind_of(0.06, 2.5), kind_of(0.9, 0.3)
    (0, 1, 10, 20)
    """
    return bisect_right(PROB_EDGES, true_prob) * (len(ENTROPY_EDGES) + 1) + bisect_right(
        ENTROPY_EDGES, entropy
    )


class KindShares:
    """Running counts of groups by kind, the same on every rank.

    What a step observed counts from `commit` on, that is, from its end. So the counts that a checkpoint holds
    are always those behind its last whole step.

    Args:
        floor: Lowest probability with which a task is accepted.
        decay: Factor on the counts before each step's are added. 1 forgets nothing.
    """

    def __init__(self, *, floor: float, decay: float) -> None:
        self.floor = floor
        self.decay = decay
        self.live = [0.0] * num_kinds()  # groups with a gradient
        self.total = [0.0] * num_kinds()
        self._observed: tuple[Sequence[int], Sequence[int]] | None = None

    def share(self, kind: int) -> float:
        """Return the smoothed share of a kind's groups that have a gradient. 1 if nothing has been seen."""
        if not any(self.total):
            return 1.0
        overall = sum(self.live) / sum(self.total)
        return (self.live[kind] + PRIOR * overall) / (self.total[kind] + PRIOR)

    @property
    def best_share(self) -> float:
        return max(map(self.share, range(len(self.total))))

    def accept_prob(self, kind: int) -> float:
        """Return the probability with which a task of this kind is accepted."""
        best = self.best_share
        return 1.0 if best == 0 else max(self.floor, self.share(kind) / best)

    def observe(self, live: Sequence[int], total: Sequence[int]) -> None:
        """Take the numbers of a step's groups by kind, over all ranks. They count from `commit` on."""
        assert len(live) == len(total) == len(self.total)
        self._observed = (live, total)

    def commit(self) -> None:
        """Count what the step observed, at its end."""
        if self._observed is not None:
            live, total = self._observed
            self.live = [self.decay * old + new for old, new in zip(self.live, live, strict=True)]
            self.total = [self.decay * old + new for old, new in zip(self.total, total, strict=True)]
            self._observed = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "true_prob_edges": list(PROB_EDGES),
            "entropy_edges": list(ENTROPY_EDGES),
            "live": list(self.live),
            "total": list(self.total),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with stored counts. Raises ValueError if they are of other kinds."""
        own = self.state_dict()
        for name in ("true_prob_edges", "entropy_edges"):
            if state.get(name) != own[name]:
                raise ValueError(
                    f"--ckpt_path: the checkpoint counts groups by kinds with {name} {state.get(name)}, and "
                    f"this version has {own[name]}; resume with the version that wrote it, or start a new "
                    "run from exported weights"
                )
        self.live, self.total, self._observed = list(state["live"]), list(state["total"]), None
