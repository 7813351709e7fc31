"""What devices can do at most."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

GIB = 2**30
DEVICES_PER_NODE = 8
# Between nodes: one 400 Gb/s adapter a device, as in a DGX H100.
NODE_LINK_BYTES_PER_S = 50e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """``peak_flops`` are operations a second in bf16, dense; ``link_bytes_per_s`` goes from one device to another of its node, in one direction."""

    name: str
    memory_bytes: float
    peak_flops: float
    bandwidth_bytes_per_s: float
    link_bytes_per_s: float

    def network_bytes_per_s(self, num_devices: int) -> float:
        """Of the slowest link among so many devices."""
        return self.link_bytes_per_s if num_devices <= DEVICES_PER_NODE else min(self.link_bytes_per_s, NODE_LINK_BYTES_PER_S)


# NVIDIA's data sheets. They give bf16 with sparsity for the H100, H200 and L40S (twice the dense rate), and NVLink and PCIe for both directions together.
# Memory is what torch reports as the device's total, not the sheet's round number: an "80 GB" card has 79.1 GiB, one of 48 GB with error correction 44.4.
DEVICES = {
    # H100 Tensor Core GPU data sheet, SXM: 1,979 TFLOPS sparse, 3.35 TB/s, NVLink 900 GB/s
    "h100": Device(name="H100 SXM", memory_bytes=79.1 * GIB, peak_flops=989e12, bandwidth_bytes_per_s=3.35e12, link_bytes_per_s=450e9),
    # H200 Tensor Core GPU data sheet, SXM: 1,979 TFLOPS sparse, 4.8 TB/s, NVLink 900 GB/s
    "h200": Device(name="H200 SXM", memory_bytes=139.8 * GIB, peak_flops=989e12, bandwidth_bytes_per_s=4.8e12, link_bytes_per_s=450e9),
    # A100 Tensor Core GPU data sheet, 80GB SXM: 312 TFLOPS dense, 2,039 GB/s, NVLink 600 GB/s
    "a100": Device(name="A100 SXM 80GB", memory_bytes=79.1 * GIB, peak_flops=312e12, bandwidth_bytes_per_s=2.039e12, link_bytes_per_s=300e9),
    # L40S data sheet: 733 TFLOPS sparse (362 dense), 864 GB/s, PCIe Gen4 x16 64 GB/s
    "l40s": Device(name="L40S", memory_bytes=44.4 * GIB, peak_flops=362e12, bandwidth_bytes_per_s=0.864e12, link_bytes_per_s=32e9),
}


def measured_cpu(dtype: torch.dtype, *, num_processes: int = 1) -> Device:
    """This machine, measured in about a second: its memory, a matrix product, and a copy. Each of the processes gets its share."""
    a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    source, target = torch.ones(2**26), torch.ones(2**26)
    peak = 2 * 1024**3 / _best_s(lambda: torch.mm(a, b))
    bandwidth = 2 * source.nbytes / _best_s(lambda: target.copy_(source))  # each byte is read and written
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        name=f"this CPU, measured ({torch.get_num_threads()} threads)",
        memory_bytes=memory / num_processes,
        peak_flops=peak / num_processes,
        bandwidth_bytes_per_s=bandwidth / num_processes,
        link_bytes_per_s=bandwidth / num_processes,
    )


def _best_s(function: Callable[[], object]) -> float:
    """Seconds of the best of five calls."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
