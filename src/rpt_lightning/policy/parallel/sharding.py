"""Shard the policy over many devices, without any process ever holding all of its weights.

The policy is built without weights, cut up, and then filled shard by shard. FSDP2 shards it layer by layer,
and the embedding by itself, so that only the head stays gathered for a whole pass. The root is the policy
itself, whose ``forward`` contains everything that uses embeddings, head and last norm.
If several devices also compute each layer together (tensor_parallel.py), that is set up first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rpt_lightning.compat.torch import map_tensors, stored_tensors
from rpt_lightning.compat.transformers import decoder_layers, type_converts_weights
from rpt_lightning.policy.adapter import base_parameters, merge_folder, not_bf16_message
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.parallel.tensor_parallel import parallelize
from rpt_lightning.pretrained.weights import (
    check_names,
    not_finite,
    not_finite_message,
    own_names,
    tied_message,
)


def materialize_sharded(
    policy: Policy,
    mesh: DeviceMesh,
    *,
    device: torch.device,
    cpu_offload: bool = False,
    gather_bf16: bool = False,
) -> None:
    """Give every process its shards in fp32, unless the policy has them already. This is a collective.

    Args:
        policy: A policy that is not materialized yet.
        mesh: A mesh with the dimensions ``data_parallel`` and ``tensor_parallel``.
        device: The device on which this process computes.
        cpu_offload: Keep weights, gradients and optimizer state in host memory and move them to the device
            layer by layer.
        gather_bf16: Gather and compute layers in bf16, which halves the traffic. Shards stay fp32, and
            gradients are summed over ranks in fp32.

    Raises:
        ValueError: The model's folder has no safetensors, its tensors are not those of the model, some of its
            values are not finite, or tensor parallelism does not fit the model.
    """
    if hasattr(policy, "model"):
        return
    policy.materialize_on_meta()
    is_tied = policy.is_tied
    parallelize(policy, mesh["tensor_parallel"])
    _shard(policy, mesh["data_parallel"], cpu_offload=cpu_offload, gather_bf16=gather_bf16)
    home = torch.device("cpu") if cpu_offload else device
    map_tensors(
        policy, lambda tensor: torch.empty_like(tensor, device=home) if tensor.is_meta else tensor.to(device)
    )
    if is_tied:  # the move separated the two
        policy.model.get_output_embeddings().weight = policy.model.get_input_embeddings().weight  # type: ignore[no-untyped-call]
    _read_shards(policy)
    if policy.adapter is not None:
        policy.start_adapter()
    elif policy.adapter_folder is not None:
        policy.check_base()
        merge_folder(policy.model, policy.adapter_folder)


def _shard(policy: Policy, mesh: DeviceMesh, *, cpu_offload: bool, gather_bf16: bool) -> None:
    # Pinned memory needs a CUDA device.
    offload: OffloadPolicy = (
        CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    )
    precision = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if gather_bf16
        else MixedPrecisionPolicy()
    )
    # The root's own group is the head, whose weight `forward` uses without calling the head, and the last
    # norm. A tied head is the embedding, and a tensor cannot be in two groups.
    embedding = () if policy.is_tied else (policy.model.get_input_embeddings(),)
    for module in (*embedding, *decoder_layers(policy.model), policy):
        fully_shard(module, mesh=mesh, offload_policy=offload, mp_policy=precision)


def _read_shards(policy: Policy) -> None:
    folder = Path(policy.model_path).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(policy.model_path, allow_patterns=["*.safetensors"]))
    # Buffers that are not part of a checkpoint were computed when the model was built.
    wanted: dict[str, Tensor] = dict(base_parameters(policy.model))
    reader = HuggingFaceStorageReader(str(folder))
    held = stored_tensors(reader)
    absent = sorted(wanted.keys() - held.keys())
    misshapen = sorted(name for name in wanted.keys() & held.keys() if held[name].size != wanted[name].size())
    if absent or misshapen or type_converts_weights(policy.config.model_type):
        what = (
            f"lacks {absent[:3]}"
            if absent
            else f"has different shapes for {misshapen[:3]}"
            if misshapen
            else "stores weights that transformers converts"
        )
        raise ValueError(
            f"policy.path={policy.path}: a sharded policy is read from safetensors files that hold the "
            f"model's own tensors, and this folder {what}; save the model with save_pretrained(..., "
            "safe_serialization=True), or use a strategy without shards "
            "(configs/strategy/single.yaml, ddp.yaml)"
        )
    where = f"policy.path={policy.path}"
    for name, parameter in wanted.items():
        if parameter.dtype == torch.bfloat16 and held[name].properties.dtype != torch.bfloat16:
            raise ValueError(not_bf16_message(name, where=where))
    # A tied head under its own name.
    copies = dict(base_parameters(policy.model, remove_duplicate=False)).keys() - wanted.keys()
    check_names(
        missing=(),
        unknown=own_names(policy.model, held.keys() - wanted.keys() - copies),
        misshapen={},
        where=where,
    )
    load(wanted, storage_reader=reader)
    bad = not_finite((name, _own_part(tensor)) for name, tensor in wanted.items())
    differing = [
        name for name in copies & held.keys() if not _is_copy(name, policy.model.get_parameter(name), reader)
    ]
    # Each rank checks its own part. The results are combined so that all ranks end together.
    bad, differing = ([name for names in _of_all_ranks(part) for name in names] for part in (bad, differing))
    if bad:
        raise ValueError(not_finite_message(set(bad), where=where))
    if differing:
        raise ValueError(tied_message(where=where))


def _is_copy(name: str, parameter: Tensor, reader: HuggingFaceStorageReader) -> bool:
    """Whether the tensor that the files hold under this name equals the parameter."""
    stored = torch.empty_like(parameter, requires_grad=False)
    load({name: stored}, storage_reader=reader)
    return torch.equal(_own_part(stored), _own_part(parameter))


def _own_part(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _of_all_ranks(names: list[str]) -> list[list[str]]:
    if not torch.distributed.is_initialized():
        return [names]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, names)
    return parts
