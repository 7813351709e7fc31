"""vLLM's own transfer of weights over NCCL (``vllm.distributed.weight_transfer``).

vLLM changes this part from release to release. It was tested without GPUs, against the sources of vLLM 0.32.0
and 0.33.0 (tests/compat/test_vllm_wheels.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def make_sender(client: Any, source: Any, *, master_address: str, master_port: int, world_size: int) -> Any:
    """Return vLLM's sender in a new NCCL group. It has ``shutdown()``, and `send_weights` uses it.

    Relies on ``WeightTransferTrainerFactory.trainer_init`` and ``NCCLTrainerInitInfo``.

    Args:
        client: Has the methods of vLLM's ``VLLMWeightSyncClient``, which call the servers.
        source: Any source (`make_source`). It is only looked at, not read.
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


def send_weights(sender: Any, source: Any) -> None:
    """Send the weights of one update.

    Relies on the sender's attribute ``source``, which ``send_weights()`` reads anew.
    """
    sender.source = source
    sender.send_weights()


def make_source(
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shapes: Mapping[str, torch.Size],
    device: torch.device,
) -> Any:
    """Return a vLLM ``WeightSource`` of one update.

    Relies on ``ParamMeta(name, dtype, shape)`` and on ``WeightSource``. Up to vLLM 0.32 its ``metadata`` is a
    method, and ``__iter__`` gives the weights. From 0.33 on, ``metadata`` must be a ``cached_property``, and
    ``iter_full`` gives them.

    Args:
        weights: Names and tensors, read once. The tensors may be on another device and of another dtype.
        dtype: Data type in which they are sent.
        shapes: Shape of every weight, in the order of ``weights``.
        device: Device from which they are sent.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    metas = [ParamMeta(name, dtype, tuple(shape)) for name, shape in shapes.items()]

    def declared(stream: Any) -> list[Any]:
        return metas

    class Stream(WeightSource):  # type: ignore[misc, unused-ignore]
        metadata: Any = cached_property(declared) if hasattr(WeightSource, "iter_full") else declared

        def iter_full(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                # With CPU offload, the tensor was gathered on the host.
                yield name, tensor.detach().to(device, dtype).contiguous()

        __iter__ = iter_full

    return Stream()
