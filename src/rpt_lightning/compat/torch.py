"""torch: CPU kernels, the compiler, and the format of distributed checkpoints. Tested with torch 2.13.0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.storage import StorageReader

# Kernels


def cpu_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention on a CPU. Return the output ``[B, H, N, d]`` and the log-sum-exp ``[B, H, N]``.

    Relies on the operator that ``scaled_dot_product_attention`` runs on CPUs. The public function does not
    return the log-sum-exp.
    """
    parts: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return parts


def cpu_flash_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value for `cpu_flash_attention`.

    Relies on the operator that belongs to the one above. ``output`` and ``logsumexp`` may be those of all
    keys if ``key`` and ``value`` are only some of them. The gradients are then the share of these keys.
    """
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    parts: tuple[Tensor, Tensor, Tensor] = backward(
        grad, query, key, value, output, logsumexp, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return parts


def has_bf16_instructions() -> bool:
    """Whether this x86 CPU multiplies bf16 matrices by itself, with AVX-512 BF16 or AMX.

    Relies on ``torch.cpu._is_avx512_bf16_supported`` and ``torch.cpu._is_amx_tile_supported``.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def allow_recompilations(most: int) -> None:
    """Let torch.compile compile one function up to ``most`` times. A higher limit stays.

    Relies on ``torch._dynamo.config.recompile_limit``. Beyond it, torch silently runs the function
    uncompiled.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, most)


# Modules and optimizers


def map_tensors(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer of a module and its submodules.

    Relies on ``Module._apply``, which is what ``to`` and ``to_empty`` call. ``to_empty`` alone would also
    overwrite buffers that are not on the meta device.
    """
    module._apply(function)  # type: ignore[no-untyped-call]


def scheduled_settings(group: Mapping[str, Any]) -> set[str]:
    """Return the settings of a parameter group that a learning-rate schedule moves.

    Relies on the mark ``base_momentum`` that OneCycleLR and CyclicLR leave in the groups whose momentum they
    move too.
    """
    return {"lr", *(("momentum", "betas") if "base_momentum" in group else ())}


# Processes


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed, usually because another rank is gone.

    Relies on the text "gloo/transport" in gloo's errors, which have no class of their own.
    """
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


# Distributed checkpoints

SHARD_INDEX = ".metadata"  # a pickle that torch.distributed.checkpoint writes last into a folder of shards
_METADATA = "torch.distributed.checkpoint.metadata"
# All that such a pickle names: module and name. Some are private.
SHARD_INDEX_NAMES = frozenset(
    {
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
        ("pathlib._local", "PosixPath"),
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("builtins", "set"),
        ("builtins", "list"),
        ("builtins", "dict"),
        ("builtins", "complex"),
    }
)


def stored_tensors(reader: StorageReader) -> dict[str, TensorStorageMetadata]:
    """Return what a checkpoint says of each of its tensors, such as ``size`` and ``properties.dtype``.

    Relies on the ``state_dict_metadata`` of what ``read_metadata`` returns.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    return {
        name: entry
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
