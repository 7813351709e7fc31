"""Processes have two roles: data-parallel and tensor-parallel.

Data-parallel ranks have different tasks. The tensor-parallel ranks of one data-parallel rank have the same
tasks and together compute one policy. So everything is counted over data-parallel ranks. Over all processes
it would be counted once for every tensor-parallel rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed import ProcessGroup

from rpt_lightning.compat.lightning import collective_timeout
from rpt_lightning.data.modules.stream import rank_share

T = TypeVar("T")
R = TypeVar("R")


class Ranks:
    """The ranks of a module that is being trained or validated.

    Everything except the properties is a collective: call it on every process.
    """

    def __init__(self, module: LightningModule) -> None:
        self._device = module.device
        self._world_size, self._global_rank = module.trainer.world_size, module.global_rank
        self._mesh: Any = module.device_mesh
        self._timeout = collective_timeout(module.trainer.strategy)

    @property
    def num_data(self) -> int:
        return int(self._mesh["data_parallel"].size()) if self._mesh is not None else self._world_size

    @property
    def data_rank(self) -> int:
        return (
            int(self._mesh["data_parallel"].get_local_rank()) if self._mesh is not None else self._global_rank
        )

    @property
    def num_tensor(self) -> int:
        return self._world_size // self.num_data

    def sum(self, value: Tensor | float) -> Tensor:
        """Sum over data-parallel ranks, in fp64 if the device has it (token counts outgrow fp32)."""
        return self._reduced(value, torch.distributed.ReduceOp.SUM)

    def max(self, value: Tensor | float) -> Tensor:
        """Maximum over data-parallel ranks."""
        return self._reduced(value, torch.distributed.ReduceOp.MAX)

    def gather(self, value: T) -> list[T]:
        """Gather one object from each data-parallel rank, in rank order."""
        return self._gathered(value, self._group("data_parallel"), self.num_data)

    def gather_parts(self, value: T) -> list[T]:
        """Gather one object from each tensor-parallel rank of this data-parallel rank."""
        return self._gathered(value, self._group("tensor_parallel"), self.num_tensor)

    def shared(self, work: Callable[[Sequence[T]], Sequence[R]]) -> Callable[[Sequence[T]], list[R]]:
        """Divide ``work`` on a list among the tensor-parallel ranks, which all hold the list.

        Every rank gets all results.
        If each rank did all of the work, their results could differ (sampled tokens, for example). A policy
        that they compute together must not get different inputs.
        """
        if self.num_tensor == 1:
            return lambda items: list(work(items))
        rank = int(self._mesh["tensor_parallel"].get_local_rank())
        return shared_work(work, rank=rank, num_ranks=self.num_tensor, gather=self.gather_parts)

    def further_groups(self) -> tuple[ProcessGroup | None, ProcessGroup | None]:
        """New process groups (gloo) of the data-parallel and the tensor-parallel ranks.

        They are for a thread other than the one that trains. None for a single process.
        """
        if self._world_size == 1:
            return None, None
        places = (
            torch.arange(self._world_size)[:, None] if self._mesh is None else self._mesh.mesh
        )  # [data, tensor]
        divide: Any = functools.partial(
            torch.distributed.new_subgroups_by_enumeration, backend="gloo", timeout=self._timeout
        )
        return divide(places.T.tolist())[0], divide(places.tolist())[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process, tensor-parallel ones included."""
        value = torch.tensor(float(flag), device=self._device)
        if self._world_size > 1:
            torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return bool(value)

    def _group(self, dimension: str) -> ProcessGroup | None:
        return None if self._mesh is None else self._mesh[dimension].get_group()

    def _reduced(self, value: Tensor | float, operation: Any) -> Tensor:
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        tensor = torch.as_tensor(value).detach().to(self._device, dtype, copy=True)
        if self.num_data > 1:
            torch.distributed.all_reduce(tensor, operation, group=self._group("data_parallel"))
        return tensor

    @staticmethod
    def _gathered(value: T, group: ProcessGroup | None, size: int) -> list[T]:
        if size == 1:
            return [value]
        values: list[Any] = [None] * size
        torch.distributed.all_gather_object(values, value, group=group)
        return values


def shared_work(
    work: Callable[[Sequence[T]], Sequence[R]],
    *,
    rank: int,
    num_ranks: int,
    gather: Callable[[list[R]], list[list[R]]],
) -> Callable[[Sequence[T]], list[R]]:
    """Divide ``work`` among ranks that hold the same list. Each rank gets all results."""

    def work_together(items: Sequence[T]) -> list[R]:
        part = list(work(rank_share(items, rank=rank, num_ranks=num_ranks)))
        return [result for results in gather(part) for result in results]

    return work_together
