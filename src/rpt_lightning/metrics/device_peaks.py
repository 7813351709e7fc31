"""Peak operations per second of GPUs in bf16, dense, from NVIDIA's data sheets.

For all GPUs except the A100 the sheets give the rate with sparsity, which is twice the dense one. Lightning's
table (`lightning.fabric.utilities.throughput`) has the sparse rate of some of these, and no Blackwell.
"""

from __future__ import annotations

import re

# Keyed by words of torch's device name. More specific keys come first.
_PEAK_FLOPS = {
    ("H100", "PCIe"): 756e12,  # H100 data sheet: 1,513 TFLOPS sparse
    ("H100", "NVL"): 835e12,  # H100 NVL data sheet: 1,671 TFLOPS sparse
    ("H100",): 989e12,  # H100 data sheet, SXM: 1,979 TFLOPS sparse
    ("GH200",): 989e12,  # GH200 data sheet: 1,979 TFLOPS sparse
    ("H200", "NVL"): 835e12,  # H200 data sheet, NVL: 1,671 TFLOPS sparse
    ("H200",): 989e12,  # H200 data sheet, SXM: 1,979 TFLOPS sparse
    ("B200",): 2250e12,  # HGX B200 data sheet: 36 PFLOPS sparse of eight GPUs
    ("GB200",): 2500e12,  # GB200 NVL72 data sheet: 360 PFLOPS sparse of 72 GPUs
    ("A100",): 312e12,  # A100 data sheet
    ("L40S",): 362e12,  # L40S data sheet: 733 TFLOPS sparse
}


def peak_flops(device_name: str) -> float | None:
    """Return the peak of a device by `torch.cuda.get_device_name`, or None if it is unknown.

    It is also None for a part of a device (MIG).

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("NVIDIA H100 PCIe")
    (989000000000000.0, 756000000000000.0)
    >>> peak_flops("NVIDIA A100-SXM4-80GB")
    312000000000000.0
    >>> peak_flops("NVIDIA H20"), peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    (None, None)
    """
    words = set(re.split(r"[ -]+", device_name))
    if "MIG" in words:
        return None
    return next((peak for needed, peak in _PEAK_FLOPS.items() if words.issuperset(needed)), None)
