"""Draws that depend on a seed and a name alone."""

from __future__ import annotations

import hashlib


def uniform(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on nothing else: neither on what was drawn before nor on ranks.

    >>> uniform(0, "doc:1") == uniform(0, "doc:1") != uniform(1, "doc:1")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6], "little") / 2**48
