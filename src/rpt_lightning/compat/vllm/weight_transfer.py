"""vLLM's own transfer of weights over NCCL (``vllm.distributed.weight_transfer``).

vLLM changes this part from release to release. It was read in vLLM 0.32 and 0.33, and has not been tried with
GPUs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def make_sender(client: Any, source: Any, *, master_address: str, master_port: int, world_size: int) -> Any:
    """Return vLLM's sender in a new NCCL group. It has ``send_weights()`` and ``shutdown()``.

    Relies on ``WeightTransferTrainerFactory.trainer_init`` and ``NCCLTrainerInitInfo``.

    Args:
        client: Has the methods of vLLM's ``VLLMWeightSyncClient``, which call the servers.
        source: The weights (`make_source`).
        master_address: Address at which the servers reach this process, which has rank 0.
        master_port: A free port there.
        world_size: Number of members of the group.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    info = NCCLTrainerInitInfo(
        master_address=master_address, master_port=master_port, world_size=world_size, rank=0
    )
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def make_source() -> Any:
    """Return a vLLM ``WeightSource`` over an iterator of weights. Call its ``fill`` before each use.

    Relies on ``WeightSource`` with ``metadata`` and on ``ParamMeta(name, dtype, shape)``.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    # A method up to vLLM 0.32, and a property from 0.33 on.
    is_property = isinstance(inspect.getattr_static(WeightSource, "metadata"), property)

    def metas(stream: Any) -> list[Any]:
        return list(stream.metas)

    class Stream(WeightSource):  # type: ignore[misc, unused-ignore]
        metadata: Any = property(metas) if is_property else metas

        def fill(
            self,
            weights: Iterable[tuple[str, Tensor]],
            dtype: torch.dtype,
            shapes: Mapping[str, torch.Size],
            device: torch.device,
        ) -> None:
            self.weights, self.dtype, self.device = weights, dtype, device
            self.metas = [ParamMeta(name, dtype, tuple(shape)) for name, shape in shapes.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.weights:
                # With CPU offload, the tensor was gathered on the host.
                yield name, tensor.detach().to(self.device, self.dtype).contiguous()

    return Stream()
