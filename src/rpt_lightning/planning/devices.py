"""Peak capabilities of devices."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rpt_lightning.metrics.device_peaks import peak_flops

GIB = 2**30
DEVICES_PER_NODE = 8
# Between nodes: one 400 Gb/s adapter for each device, as in a DGX H100.
NODE_LINK_BYTES_PER_S = 50e9
# A device's share of its host's memory bandwidth. The host has two sockets with eight channels of DDR5-4800
# each for eight devices, as in a DGX H100.
HOST_BANDWIDTH_BYTES_PER_S = 77e9
# From a device into new, unpinned memory of its host, with every device of the node at once. The system
# clears each page first, so this is far slower than the link. An assumption: on two cores, a copy into new
# memory reached 1.2 GB/s, and into memory that was kept 3.
NEW_MEMORY_BYTES_PER_S = 8e9

# The digests of weights that go through a folder (XXH3, one thread). An assumption: on two busy cores it read
# twice as fast as a copy.
DIGEST_BYTES_PER_S = 10e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """Peak capabilities of one device.

    ``peak_flops`` are operations per second in bf16, dense. ``link_bytes_per_s`` is the speed in one
    direction from one device to another in the same node. ``host_link_bytes_per_s`` is the speed from the
    host's memory to the device, or back.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    bandwidth_bytes_per_s: float
    link_bytes_per_s: float
    host_link_bytes_per_s: float

    def network_bytes_per_s(self, num_devices: int) -> float:
        """Return the speed of rings through ``num_devices`` devices.

        Between nodes there are as many rings as adapters, and each ring leaves a node through one adapter. So
        a node sends at the speed of all its adapters together.
        """
        return (
            self.link_bytes_per_s
            if num_devices <= DEVICES_PER_NODE
            else min(self.link_bytes_per_s, DEVICES_PER_NODE * NODE_LINK_BYTES_PER_S)
        )


def _gpu(
    chip: str,
    name: str,
    *,
    memory_gib: float,
    terabytes_per_s: float,
    link_gigabytes_per_s: float,
    host_gigabytes_per_s: float,
) -> Device:
    peak = peak_flops(chip)
    assert peak is not None
    return Device(
        name=name,
        memory_bytes=memory_gib * GIB,
        peak_flops=peak,
        bandwidth_bytes_per_s=terabytes_per_s * 1e12,
        link_bytes_per_s=link_gigabytes_per_s * 1e9,
        host_link_bytes_per_s=host_gigabytes_per_s * 1e9,
    )


# From NVIDIA's data sheets, which give NVLink and PCIe for both directions together. The peak comes from
# metrics/device_peaks.py. Memory is the total that torch reports, not the sheet's round number: an "80 GB"
# card has 79.1 GiB, and one of 48 GB with error correction has 44.4.
DEVICES = {
    # H100 Tensor Core GPU data sheet, SXM: 3.35 TB/s, NVLink 900 GB/s, PCIe Gen5 128 GB/s
    "h100": _gpu(
        "H100",
        "H100 SXM",
        memory_gib=79.1,
        terabytes_per_s=3.35,
        link_gigabytes_per_s=450,
        host_gigabytes_per_s=64,
    ),
    # H200 Tensor Core GPU data sheet, SXM: 4.8 TB/s, NVLink 900 GB/s, PCIe Gen5 128 GB/s
    "h200": _gpu(
        "H200",
        "H200 SXM",
        memory_gib=139.8,
        terabytes_per_s=4.8,
        link_gigabytes_per_s=450,
        host_gigabytes_per_s=64,
    ),
    # A100 Tensor Core GPU data sheet, 80GB SXM: 2,039 GB/s, NVLink 600 GB/s, PCIe Gen4 64 GB/s
    "a100": _gpu(
        "A100",
        "A100 SXM 80GB",
        memory_gib=79.1,
        terabytes_per_s=2.039,
        link_gigabytes_per_s=300,
        host_gigabytes_per_s=32,
    ),
    # L40S data sheet: 864 GB/s, PCIe Gen4 x16 64 GB/s
    "l40s": _gpu(
        "L40S",
        "L40S",
        memory_gib=44.4,
        terabytes_per_s=0.864,
        link_gigabytes_per_s=32,
        host_gigabytes_per_s=32,
    ),
}


def measured_cpu(dtype: torch.dtype, *, num_processes: int = 1) -> Device:
    """Measure this machine in about a second: its memory, a matrix product and a copy.

    Each of the ``num_processes`` processes gets an equal share.
    """
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
        host_link_bytes_per_s=bandwidth / num_processes,
    )


def _best_s(function: Callable[[], object]) -> float:
    """Return the seconds of the fastest of five calls."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
