"""Logs how well a run uses its machines, as metrics of every step, and how often the run was restarted."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.metrics.device_peaks import peak_flops
from rpt_lightning.records.run_folder import CONFIG_FILE
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.step_meter import StepMeter

_GIB = 2**30


class MachineStats(StepMeter):
    """Logs the speed and memory of a run, and how often it was restarted.

    The metrics are ``perf/device_tokens_per_s``, ``perf/mfu``, ``perf/host_memory_gib``,
    ``perf/gpu_memory_gib`` and ``run/restarts`` (docs/metrics.md).

    ``perf/mfu`` is the share of the devices' peak that
    training reaches: the operations of the forward and backward passes, divided by the seconds of these
    passes and of the optimizer. Host memory is the process's own resident memory at the end of the step. GPU
    memory is the most that torch held during the step. Both are those of the worst rank, without engines in
    other processes.

    Args:
        peak_flops_per_device: Largest number of dense operations per second that one device can do, in the
            run's precision. None takes it from metrics/device_peaks.py, which lists some GPUs in bf16.
            Without a known peak, perf/mfu is left out.
    """

    def __init__(self, peak_flops_per_device: float | None = None) -> None:
        if peak_flops_per_device is not None and peak_flops_per_device <= 0:
            raise ValueError(
                f"machine.peak_flops_per_device={peak_flops_per_device}: give operations per second, such as "
                "989e12, or null"
            )
        self.peak_flops_per_device = peak_flops_per_device
        self._peak_flops: float | None = None
        self._num_restarts = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_restarts = max(0, len(start_configs(Path(trainer.default_root_dir))) - 1)
        name = torch.cuda.get_device_name(pl_module.device) if pl_module.device.type == "cuda" else "a CPU"
        self._peak_flops = self.peak_flops_per_device or (
            peak_flops(name) if trainer.precision == "bf16-mixed" else None
        )
        if self._peak_flops is None:
            rank_zero_info(
                f"perf/mfu is left out: the peak of {name} in {trainer.precision} is not known here; "
                "set it with --machine.peak_flops_per_device (operations per second)"
            )

    def measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        assert isinstance(module, PolicyModule)
        memory = {}
        if (resident := _resident_bytes()) is not None:
            memory["perf/host_memory_gib"] = resident / _GIB
        if module.device.type == "cuda":
            memory["perf/gpu_memory_gib"] = torch.cuda.max_memory_reserved(module.device) / _GIB
            torch.cuda.reset_peak_memory_stats(module.device)
        if trainer.world_size > 1 and memory:
            worst = trainer.strategy.reduce(
                torch.tensor(list(memory.values()), device=module.device), reduce_op="max"
            )
            memory = dict(zip(memory, worst.tolist(), strict=True))
        return (
            memory
            | speed_metrics(module.step_metrics, self._peak_flops, trainer.world_size)
            | {"run/restarts": float(self._num_restarts)}
        )


def speed_metrics(logged: Mapping[str, float], peak: float | None, num_devices: int) -> dict[str, float]:
    """Tokens per second and share of the peak of one device, from a step's metrics over all ranks.

    Args:
        logged: What the step has logged so far.
        peak: Peak of one device, in operations per second. None leaves the share out.
        num_devices: Number of devices.
    """
    metrics = {"perf/device_tokens_per_s": logged["cost/tokens"] / logged["cost/time_s"] / num_devices}
    if peak is not None:
        seconds = logged["time/forward_backward_s"] + logged["time/optimizer_s"]
        metrics["perf/mfu"] = logged["cost/train_flops"] / seconds / num_devices / peak
    return metrics


def start_configs(run_folder: Path) -> list[Path]:
    """One file for each start of a run: ``config.yaml``, then ``config-2.yaml`` and so on."""
    first = run_folder / CONFIG_FILE
    return [
        path
        for path in [first, *run_folder.glob("config-*.yaml")]
        if path.exists() and re.fullmatch(r"config(-\d+)?\.yaml", path.name)
    ]


def _resident_bytes() -> int | None:
    """Resident memory of this process. None if the system does not report it (Linux does)."""
    if sys.platform != "linux":
        return None
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
