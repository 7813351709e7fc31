"""The policy's weights as a stream of (Hugging Face name, tensor), the form in which an engine and an export take them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import cast

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rpt_lightning.policy.model import Policy

HEAD_NAME = "lm_head.weight"


def named_weights(policy: Policy, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight, or those of ``names``, under its Hugging Face name, one at a time, gathered where it is sharded (a collective: call it on every rank).

    A tied output head is one parameter with two names and is yielded under both: vLLM's ``reload_weights`` is silently wrong without it.
    """
    if isinstance(policy, FSDPModule):
        policy.reshard()  # a forward pass without a backward pass leaves the root as it was gathered, which may be in bf16
    for name, parameter in policy.model.named_parameters():
        if names is None or name in names:
            yield name, _whole(parameter)
    if policy.is_tied and (names is None or HEAD_NAME in names):
        yield HEAD_NAME, _whole(policy.head_weight)


def _whole(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    # With CPU offload the shards are on the host, where gathering goes through sockets: on their devices it goes over the devices' links.
    return cast(DTensor, tensor.to(tensor.device_mesh.device_type)).full_tensor()
