"""Random numbers that depend only on a seed and a name."""

from __future__ import annotations

import hashlib


def uniform(seed: int, key: str) -> float:
    """Draw a number in [0, 1) that depends only on the seed and the key, not on earlier draws or on ranks.

    >>> uniform(0, "doc:1") == uniform(0, "doc:1") != uniform(1, "doc:1")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6], "little") / 2**48
