"""vLLM's in-process executor on the device that the trainer uses.

vLLM's own takes device 0, whichever the process computes on: with several ranks on a node all engines would crowd on the first GPU. Its launcher modes choose
by rank, but then take the trainer's ranks for their own tensor-parallel group.
"""

from __future__ import annotations

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class OwnDeviceExecutor(UniProcExecutor):
    """One worker on ``torch.cuda.current_device()``, which Lightning sets to the rank's own."""

    def _distributed_args(self) -> tuple[str, int, int]:
        init_method, rank, local_rank = super()._distributed_args()
        return init_method, rank, torch.cuda.current_device() if torch.cuda.is_available() else local_rank
