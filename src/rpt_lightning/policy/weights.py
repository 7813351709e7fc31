"""The policy's weights as a stream of (Hugging Face name, tensor), as engines and exports take them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, cast

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rpt_lightning.compat.peft import adapted_layers, part_names, parts
from rpt_lightning.policy.adapter import base_parameters, merged
from rpt_lightning.policy.model import Policy

HEAD_NAME = "lm_head.weight"


def named_weights(
    policy: Policy, names: Collection[str] | None = None, *, merge: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield weights one at a time under their Hugging Face names.

    ``names`` selects weights. None yields all of them. Sharded weights are gathered, which is a collective,
    so call this on every rank. A tied output head is one parameter with two names, and it is yielded under
    both. Without the second name, vLLM's ``reload_weights`` is silently wrong. An adapter
    is merged into the weights of its layers, in fp32, unless ``merge`` is false.
    """
    if isinstance(policy, FSDPModule):
        policy.reshard()  # after a forward pass alone, the root stays gathered, perhaps in bf16
    layers = adapted_layers(policy.model) if merge and policy.adapter is not None else {}
    for name, parameter in base_parameters(policy.model):
        if names is None or name in names:
            layer = layers.get(name.removesuffix(".weight"))
            yield name, _whole(parameter) if layer is None else _merged(layer)
    if policy.is_tied and (names is None or HEAD_NAME in names):
        yield HEAD_NAME, _whole(policy.head_weight)


def adapter_weights(policy: Policy) -> dict[str, Tensor]:
    """Return A and s B of all layers in fp32, by the names that A and B have among the model's parameters.

    An engine that multiplies with the adapter needs no other factor. If they are sharded, this is a
    collective.
    """
    if isinstance(policy, FSDPModule):
        policy.reshard()
    found = {}
    for name, layer in adapted_layers(policy.model).items():
        _, a, b, scale = parts(layer)
        a_name, b_name = part_names(name)
        found[a_name], found[b_name] = _whole(a).float(), _whole(b).float() * scale
    return found


def _merged(layer: Any) -> Tensor:
    weight, a, b, scale = parts(layer)
    return merged(_whole(weight), _whole(a), _whole(b), scale)


def _whole(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    # With CPU offload, the shards are on the host, where gathering uses sockets. Moving them to their devices
    # first uses the links between devices.
    return cast(DTensor, tensor.to(tensor.device_mesh.device_type)).full_tensor()
