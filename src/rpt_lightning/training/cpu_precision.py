"""Whether bf16 pays off on this machine's CPU."""

from __future__ import annotations

import platform

from rpt_lightning.compat.torch import has_bf16_instructions


def bf16_is_slow() -> bool:
    """Whether bf16 matrices are slower than fp32 ones here: true on x86 without instructions for bf16.

    Measured on an AMD EPYC with AVX2: bf16 runs at 17 GFLOP/s and fp32 at 125. Measured with one thread on an
    Intel Xeon (Ice Lake), which has AVX-512 but not its bf16 extension: 35 and 150 GFLOP/s.
    """
    return platform.machine() in ("x86_64", "AMD64") and not has_bf16_instructions()
