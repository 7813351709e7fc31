"""The policy over many devices: FSDP2, layer by layer, with the policy itself as the root."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from rpt_lightning.policy.model import Policy


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Shards every decoder layer, and what is left (embeddings, head, last norm) with the policy, whose ``forward`` holds all that uses it.

    Does nothing where the policy is sharded already.
    """
    if hasattr(policy, "unshard"):
        return
    layers: Any = policy.model.base_model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
