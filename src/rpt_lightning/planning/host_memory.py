"""Host memory that CPU offload, or the offload of the moments, needs.

With CPU offload, weights and gradients are in pinned memory, from which a device can copy while it computes,
and the optimizer's state is in ordinary memory. Moments that are offloaded by themselves are pinned. torch's
allocator of pinned memory rounds every block up to a power of two
(``aten/src/ATen/core/CachingHostAllocator.h``), unless ``PYTORCH_ALLOC_CONF`` has
``pinned_max_round_threshold_mb``. Read in torch's source, never measured with a GPU.
"""

from __future__ import annotations

from rpt_lightning.planning.memory import FP32_BYTES
from rpt_lightning.planning.model_shape import ModelShape

# CUDA, Lightning, vLLM and the data in a training process, without weights. This is an assumption.
PROCESS_BYTES = 5e9


def offloaded_bytes(shape: ModelShape, *, num_ranks: int, optimizer_bytes_per_param: float) -> float:
    """Count the bytes on the host of one rank: pinned weights and gradients, and the optimizer's state."""
    moments = optimizer_bytes_per_param * shape.num_params / num_ranks
    return 2 * pinned_shard_bytes(shape, num_ranks=num_ranks) + moments


def offloaded_moment_bytes(shape: ModelShape, *, num_shards: int, optimizer_bytes_per_param: float) -> float:
    """Count the bytes on the host of one rank whose moments are offloaded. They are pinned."""
    return optimizer_bytes_per_param / FP32_BYTES * pinned_shard_bytes(shape, num_ranks=num_shards)


def pinned_shard_bytes(shape: ModelShape, *, num_ranks: int) -> float:
    """Count the bytes of one rank's shard of the weights in pinned memory.

    FSDP2 cuts each matrix by rows and pins each part by itself. Vectors (norms, biases) are not counted.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    layer = [
        *((shape.attention_width, hidden), (hidden, shape.attention_width)),
        *[(shape.kv_width, hidden)] * 2,
        *((inner, hidden), (inner, hidden), (hidden, inner)),
    ]
    outer = [(shape.vocab_size, hidden)] * (1 if shape.is_tied else 2)
    matrices = [*layer * shape.num_layers, *outer]
    return sum(_power_of_two(FP32_BYTES * -(-rows // num_ranks) * columns) for rows, columns in matrices)


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()
