"""Lightning's FSDP2 strategy with the settings that it leaves to its users.

They are the number of data-parallel ranks, weights in host memory, and layers gathered in bf16.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from rpt_lightning.compat.lightning import set_data_parallel_size, set_device, tensor_parallel_size
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.parallel.sharding import materialize_sharded


class ShardedStrategy(ModelParallelStrategy):
    """Shards weights, gradients and optimizer over data-parallel ranks.

    Each rank may be several devices that compute one layer together.

    Args:
        tensor_parallel_size: Number of devices that compute one policy together, at most the number of
            devices of a node. The other dimension is data-parallel.
        cpu_offload: Keep weights, gradients and optimizer state in host memory.
        gather_bf16: Gather and compute layers in bf16, which halves the traffic. It needs
            ``--trainer.precision bf16-mixed``. Weights stay fp32 and gradients are added up in fp32. The only
            difference is that activations between layers are bf16 too.
        timeout_s: Seconds after which a collective ends the run if a rank does not take part in it.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        cpu_offload: bool = False,
        gather_bf16: bool = False,
        timeout_s: float = 1800.0,
    ) -> None:
        if tensor_parallel_size < 1:
            raise ValueError(
                f"trainer.strategy.tensor_parallel_size={tensor_parallel_size}: "
                "give 1 (no tensor parallelism) or more"
            )
        # With weights in host memory there are also collectives on host tensors (the gradient norm).
        backend = "cpu:gloo,cuda:nccl" if cpu_offload and torch.cuda.is_available() else None
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            process_group_backend=backend,
            timeout=timedelta(seconds=timeout_s),
        )
        self.cpu_offload = cpu_offload
        self.gather_bf16 = gather_bf16

    def setup_environment(self) -> None:
        size = tensor_parallel_size(self)
        num_data_parallel, rest = divmod(self.num_nodes * self.num_processes, size)
        set_data_parallel_size(self, num_data_parallel)
        if rest or self.num_processes % size:
            raise ValueError(
                f"trainer.strategy.tensor_parallel_size={size}: the {self.num_processes} devices of a node "
                f"cannot be divided into groups of {size}; give a divisor of trainer.devices"
            )
        super().setup_environment()

    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        # The weights are already in place. Only Lightning's note of the module's device is missing.
        assert self.lightning_module is not None
        set_device(self.lightning_module, self.root_device)


def materialize(policy: Policy, strategy: Any) -> None:
    """Load a policy's weights as a Lightning strategy needs them. None: whole, on the host."""
    if strategy is not None:
        policy.train_on(strategy.root_device)
    if isinstance(strategy, ModelParallelStrategy):
        materialize_sharded(
            policy,
            strategy.device_mesh,
            device=strategy.root_device,
            cpu_offload=getattr(strategy, "cpu_offload", False),
            gather_bf16=getattr(strategy, "gather_bf16", False),
        )
    else:
        policy.materialize()
