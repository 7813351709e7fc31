"""What a run costs its machines, as metrics of every step, and how often it was started again."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rpt_lightning.metrics.run_folder import CONFIG_FILE
from rpt_lightning.training.policy_module import PolicyModule

_GIB = 2**30


class MachineStats(Callback):
    """Logs ``perf/host_memory_gib`` and, on GPUs, ``perf/gpu_memory_gib`` (of the worst rank) and ``run/restarts``.

    Host memory is the process's own resident memory at the end of the step; GPU memory is the largest that torch held during the step. Engines in other
    processes are not in it.
    """

    def __init__(self) -> None:
        self._num_restarts = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_restarts = max(0, len(start_configs(Path(trainer.default_root_dir))) - 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, PolicyModule)
        metrics = {}
        if (resident := _resident_bytes()) is not None:
            metrics["perf/host_memory_gib"] = resident / _GIB
        if pl_module.device.type == "cuda":
            metrics["perf/gpu_memory_gib"] = torch.cuda.max_memory_reserved(pl_module.device) / _GIB
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        if trainer.world_size > 1 and metrics:
            worst = trainer.strategy.reduce(torch.tensor(list(metrics.values()), device=pl_module.device), reduce_op="max")
            metrics = dict(zip(metrics, worst.tolist(), strict=True))
        pl_module.log_step(metrics | {"run/restarts": float(self._num_restarts)})


def start_configs(run_folder: Path) -> list[Path]:
    """One file for each start of a run: ``config.yaml``, and ``config-2.yaml`` and so on."""
    first = run_folder / CONFIG_FILE
    return [path for path in [first, *run_folder.glob("config-*.yaml")] if path.exists() and re.fullmatch(r"config(-\d+)?\.yaml", path.name)]


def _resident_bytes() -> int | None:
    """None where the system does not say (Linux does)."""
    if sys.platform != "linux":
        return None
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
