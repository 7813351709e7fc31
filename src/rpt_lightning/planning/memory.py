"""Memory of one device at its fullest, part by part.

The terms follow what this code and transformers' Llama, Qwen2 and Qwen3 layers keep for the backward pass, tensor by tensor. Tests compare them with
the tensors that autograd really saves, and the sum with a real training process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rpt_lightning.planning.model_shape import ModelShape
from rpt_lightning.policy.logprobs import VOCAB_CHUNK

Strategy = Literal["single", "ddp", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = ("single", "ddp", "fsdp2")
FP32_BYTES = 4
BF16_BYTES = 2
# Beside its weights vLLM keeps room for its own activations and CUDA graphs; an assumption, in the range that its start-up log reports.
ENGINE_WORKSPACE_BYTES = 2 * 2**30
# CUDA's context, NCCL's buffers and what the allocator cannot use again; an assumption.
GPU_OVERHEAD_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Of one device. The first group is there throughout, the second while a micro-batch of the largest size is computed."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    buckets_bytes: float  # DDP's second copy of the gradients

    cast_weights_bytes: float  # autocast's 16-bit copy of the weights
    gathered_bytes: float  # what FSDP2 has gathered at a time
    activations_bytes: float
    masks_bytes: float
    logits_bytes: float  # one tile of them, and the head's gradient while it is summed

    @property
    def total_bytes(self) -> float:
        return float(sum(vars(self).values()))


def training_memory(
    shape: ModelShape,
    *,
    strategy: Strategy,
    num_ranks: int,
    micro_batch_tokens: int,
    is_mixed: bool,
    checkpointing: bool,
    optimizer_bytes_per_param: float,
    logprob_chunk_size: int,
) -> TrainingMemory:
    """Args:
    shape: Of the policy, whose weights are fp32.
    strategy: "single" and "ddp" hold everything on each device, "fsdp2" shards weights, gradients and optimizer over the ranks.
    num_ranks: Data-parallel ranks.
    micro_batch_tokens: Of the largest micro-batch.
    is_mixed: bf16-mixed; otherwise fp32 throughout.
    checkpointing: Layers are computed again in the backward pass.
    optimizer_bytes_per_param: Of the optimizer's state; 8 for AdamW.
    logprob_chunk_size: Tokens whose logits exist at the same time.
    """
    parts = num_ranks if strategy == "fsdp2" else 1
    copy = FP32_BYTES * shape.num_params / parts
    return TrainingMemory(
        weights_bytes=copy,
        gradients_bytes=copy,
        optimizer_bytes=optimizer_bytes_per_param * shape.num_params / parts,
        buckets_bytes=copy if strategy == "ddp" else 0,
        # Autocast keeps what it casts until the training step ends, also of weights that FSDP2 has long scattered again: a whole copy on every rank.
        # The head is cast tile by tile.
        cast_weights_bytes=BF16_BYTES * shape.num_layers * shape.layer_params if is_mixed else 0,
        gathered_bytes=_gathered_bytes(shape) if strategy == "fsdp2" else 0,
        activations_bytes=activation_bytes(shape, micro_batch_tokens, is_mixed=is_mixed, checkpointing=checkpointing)
        + _passing_bytes(shape, micro_batch_tokens, is_mixed=is_mixed),
        masks_bytes=mask_bytes(shape, micro_batch_tokens, is_mixed=is_mixed, checkpointing=checkpointing),
        logits_bytes=logits_bytes(shape, min(logprob_chunk_size, micro_batch_tokens)),
    )


def layer_activation_bytes(shape: ModelShape, *, is_mixed: bool) -> int:
    """What one decoder layer keeps of one token for its backward pass.

    Norms keep their fp32 input and its normalised form, and one fp32 number. Autocast casts a layer's input once for each product that takes it: q, k and v,
    gate and up have copies of their own. Under a mask keys and values are repeated to all heads.
    """
    hidden, attention, inner = shape.hidden_size, shape.attention_width, shape.intermediate_size
    width = BF16_BYTES if is_mixed else FP32_BYTES
    norms = 2 * (2 * FP32_BYTES * hidden + FP32_BYTES)
    inputs = (5 if is_mixed else 2) * width * hidden
    attention_bytes = 4 * width * attention + FP32_BYTES * shape.num_heads  # q, k, v, output; log-sum-exp
    mlp = 4 * width * inner  # gate, its activation, up, their product
    qk_norms = 0
    if shape.has_qk_norm:
        num_heads = (attention + shape.kv_width) // shape.head_dim
        kept = FP32_BYTES + BF16_BYTES if is_mixed else 2 * FP32_BYTES
        qk_norms = kept * (attention + shape.kv_width) + FP32_BYTES * num_heads
    return norms + inputs + attention_bytes + mlp + qk_norms


def activation_bytes(shape: ModelShape, num_tokens: int, *, is_mixed: bool, checkpointing: bool) -> int:
    """What the layers and the last norm keep for the backward pass, attention masks apart."""
    layer = layer_activation_bytes(shape, is_mixed=is_mixed)
    # With checkpointing each layer's input, and all of the one that is being computed again.
    layers = shape.num_layers * FP32_BYTES * shape.hidden_size + layer if checkpointing else shape.num_layers * layer
    last_norm = 2 * FP32_BYTES * shape.hidden_size + FP32_BYTES
    rotary = 2 * FP32_BYTES * shape.head_dim
    return num_tokens * (layers + last_norm + rotary)


def mask_bytes(shape: ModelShape, num_tokens: int, *, is_mixed: bool, checkpointing: bool) -> int:
    """The tree's mask, and each layer's own copy of it in the dtype of its attention, which `scaled_dot_product_attention` makes and keeps."""
    width = BF16_BYTES if is_mixed else FP32_BYTES
    return num_tokens**2 * (1 + width * (1 if checkpointing else shape.num_layers))


def logits_bytes(shape: ModelShape, chunk_tokens: int) -> int:
    """`policy/logprobs.py`: a tile's logits and probabilities in fp32, and the head's gradient, which is summed over tokens in fp32."""
    return 2 * FP32_BYTES * chunk_tokens * min(shape.vocab_size, VOCAB_CHUNK) + FP32_BYTES * shape.head_params


def _passing_bytes(shape: ModelShape, num_tokens: int, *, is_mixed: bool) -> int:
    """Gradients of activations that are alive at a time, in the feed-forward part of a layer, where they are most."""
    width = BF16_BYTES if is_mixed else FP32_BYTES
    return num_tokens * (3 * width * shape.intermediate_size + 2 * FP32_BYTES * shape.hidden_size)


def _gathered_bytes(shape: ModelShape) -> int:
    """fp32: embedding and head stay gathered for the whole pass, with their gradients; two layers (one is fetched ahead), and one layer's gradient twice, before
    and while it is scattered."""
    return FP32_BYTES * (2 * shape.outer_params + 4 * shape.layer_params)


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Of one device, beside the training: the engine's own copy of the weights, and room for cached keys and values."""

    weights_bytes: float
    kv_cache_bytes: float
    workspace_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.kv_cache_bytes + self.workspace_bytes


def vllm_gpu_memory(weights_bytes: float, *, device_bytes: float, utilization: float) -> EngineMemory:
    """vLLM takes its share of the device whole; what weights and workspace leave of it is cache (it may be below 0)."""
    room = utilization * device_bytes - weights_bytes - ENGINE_WORKSPACE_BYTES
    return EngineMemory(weights_bytes=weights_bytes, kv_cache_bytes=room, workspace_bytes=ENGINE_WORKSPACE_BYTES)
