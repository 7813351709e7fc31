"""Keeps the optimizer's moments in host memory, and brings them to the device for each step.

Weights and gradients stay on the device. AdamW's two moments are as large as both together, and only the step
reads them. prime-rl does the same (``optim_cpu_offload``), and verl (``optimizer_offload``). The step itself
runs where it ran before, so the weights are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class MomentsOffload:
    """Moves the state tensors of an optimizer before and after each of its steps.

    A state tensor belongs to a parameter and has at least one dimension. Counters of steps have none, and
    stay where the optimizer keeps them. Each tensor has one buffer on the host for the whole run. Shards
    (DTensors) are moved part by part, without communication.

    Args:
        optimizer: The optimizer. Its ``step`` moves the state from now on.
        device: Where the step computes.
        host: Where the state is between two steps.
        pin: Whether the buffers are page-locked, so that a GPU copies at the full speed of its link.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        device: torch.device,
        host: torch.device = torch.device("cpu"),  # noqa: B008, a constant
        pin: bool,
    ) -> None:
        self.optimizer = optimizer
        self.device = device
        self.host = host
        self.pin = pin
        self._buffers: dict[tuple[Tensor, str], Tensor] = {}
        optimizer.register_step_pre_hook(lambda *_: self.to_device())
        optimizer.register_step_post_hook(lambda *_: self.to_host())

    @torch.no_grad()
    def to_device(self) -> None:
        """Bring the state to the device. What is not in its buffer is there already."""
        for key, state in self._entries():
            _, name = key
            buffer = self._buffers.get(key)
            if buffer is not None and state[name] is buffer:
                state[name] = torch.empty_like(buffer, device=self.device)
                _copy(state[name], buffer)

    @torch.no_grad()
    def to_host(self) -> None:
        """Put the state into its buffers, and return once it is there.

        An optimizer that has loaded a checkpoint holds it on the device until then.
        """
        for key, state in self._entries():
            _, name = key
            value = state[name]
            if key not in self._buffers:
                self._buffers[key] = self._new_buffer(value)
            if value is not self._buffers[key]:
                _copy(self._buffers[key], value)
                state[name] = self._buffers[key]
        if self.device.type != "cpu":  # a checkpoint may be the next to read the buffers
            torch.accelerator.synchronize(self.device)

    def _entries(self) -> Iterator[tuple[tuple[Tensor, str], dict[str, Any]]]:
        """Yield (parameter, name) of each state tensor, and the state that holds it."""
        for parameter, state in self.optimizer.state.items():
            for name, value in list(state.items()):
                if isinstance(value, Tensor) and value.ndim > 0:
                    yield (parameter, name), state

    def _new_buffer(self, value: Tensor) -> Tensor:
        buffer = torch.empty_like(value, device=self.host)
        if self.pin:
            _own_part(buffer).data = torch.empty_like(_own_part(buffer), pin_memory=True)
        return buffer


def offloaded_moments(optimizer: Optimizer, strategy: Any) -> MomentsOffload:
    """Offload the moments of an optimizer under a Lightning strategy.

    Raises:
        ValueError: The strategy keeps weights and optimizer in host memory already.
    """
    if getattr(strategy, "cpu_offload", False):
        raise ValueError(
            "--model.offload_moments true: with --trainer.strategy.cpu_offload true the moments are in host "
            "memory already, and the step runs there; give one of the two"
        )
    device = strategy.root_device
    if device.type == "cpu":
        rank_zero_info(
            "model.offload_moments: this run computes on a CPU, so the moments are only copied from host "
            "memory to host memory"
        )
    return MomentsOffload(optimizer, device=device, pin=device.type == "cuda")


def _copy(target: Tensor, source: Tensor) -> None:
    _own_part(target).copy_(_own_part(source), non_blocking=True)


def _own_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
