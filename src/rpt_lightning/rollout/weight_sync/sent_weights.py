"""A record of what an update of the weights sent to servers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SentWeights:
    """What one update sent.

    Attributes:
        num_bytes: Bytes that a server reads if it holds the version before. The first rank wrote them.
        num_full_bytes: Bytes of a full set that was written for servers that come late, or because patches
            would not be smaller.
        changed_frac: Share of the weights' entries, in the engine's dtype, whose bits changed since the last
            version. 1 if there is none to compare with.
    """

    num_bytes: int = 0
    num_full_bytes: int = 0
    changed_frac: float = 0.0
