"""Memory of one device at its fullest, part by part.

The terms follow what this code and transformers' Llama, Qwen2 and Qwen3 layers keep for the backward pass, tensor by tensor. Tests compare them with
the tensors that autograd really saves, and the sum with a real training process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rpt_lightning.planning.model_shape import ModelShape
from rpt_lightning.policy.block_mask import BLOCK
from rpt_lightning.policy.logprobs import CPU_VOCAB_CHUNK, VOCAB_CHUNK

Strategy = Literal["single", "ddp", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = ("single", "ddp", "fsdp2")
FP32_BYTES = 4
BF16_BYTES = 2
ADAM_BYTES = 2 * FP32_BYTES
# Beside its weights vLLM keeps room for its own activations and CUDA graphs; an assumption, in the range that its start-up log reports.
ENGINE_WORKSPACE_BYTES = 2 * 2**30
# CUDA's context, NCCL's buffers and what the allocator cannot use again; an assumption.
GPU_OVERHEAD_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Widths of what a step computes with; the weights that the optimizer changes are fp32 in any case."""

    compute_bytes: int  # of a matrix product
    stream_bytes: (
        int  # of the activations that run from layer to layer, and of the weights as a layer sees them
    )


FP32 = Precision(compute_bytes=FP32_BYTES, stream_bytes=FP32_BYTES)
AUTOCAST = Precision(compute_bytes=BF16_BYTES, stream_bytes=FP32_BYTES)
GATHERED_BF16 = Precision(
    compute_bytes=BF16_BYTES, stream_bytes=BF16_BYTES
)  # FSDP2 hands the layers bf16 weights


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Of one device. The first group is there throughout, the second at the fullest moment of a step."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    buckets_bytes: float  # DDP's second copy of the gradients

    cast_weights_bytes: float  # autocast's 16-bit copy of the weights
    gathered_bytes: float  # what FSDP2 has gathered at a time
    activations_bytes: float  # kept for the backward pass
    masks_bytes: float
    work_bytes: float  # beside all that, while a layer or the head is differentiated or the optimizer steps: the largest of them

    @property
    def lasting_bytes(self) -> float:
        """Between two trainings too."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.buckets_bytes

    @property
    def total_bytes(self) -> float:
        return float(sum(vars(self).values()))


def training_memory(
    shape: ModelShape,
    *,
    strategy: Strategy,
    num_ranks: int,
    micro_batch_tokens: int,
    masked_pairs: int,
    precision: Precision,
    checkpointing: bool,
    optimizer_bytes_per_param: float,
    logprob_chunk_size: int,
    on_gpu: bool,
    cpu_offload: bool = False,
) -> TrainingMemory:
    """Args:
    shape: Of the policy, whose weights are fp32.
    strategy: "single" and "ddp" hold everything on each device, "fsdp2" shards weights, gradients and optimizer over the ranks.
    num_ranks: Data-parallel ranks.
    micro_batch_tokens: Of the largest micro-batch, all of them scored at worst.
    masked_pairs: That attention on CPU computes under a mask (``StepTokens``).
    precision: FP32, AUTOCAST, or GATHERED_BF16 with "fsdp2" only.
    checkpointing: Layers are computed again in the backward pass.
    optimizer_bytes_per_param: Of the optimizer's state; 8 for AdamW.
    logprob_chunk_size: Tokens whose logits exist at the same time.
    on_gpu: Which kernels run.
    cpu_offload: With "fsdp2": weights, gradients and optimizer are in host memory, and the optimizer steps there.
    """
    is_sharded = strategy == "fsdp2"
    copy = (
        0.0
        if is_sharded and cpu_offload
        else FP32_BYTES * shape.num_params / (num_ranks if is_sharded else 1)
    )
    gathered = _gathered_bytes(shape, precision) if is_sharded else 0
    activations = activation_bytes(
        shape, micro_batch_tokens, precision=precision, checkpointing=checkpointing
    )
    activations += (
        precision.compute_bytes * micro_batch_tokens * shape.hidden_size
    )  # what the head multiplies
    masks = block_mask_bytes(micro_batch_tokens) if on_gpu else precision.compute_bytes * masked_pairs
    layer_work = _layer_work_bytes(
        shape, micro_batch_tokens, precision=precision, checkpointing=checkpointing
    )
    vocab_chunk = min(shape.vocab_size, VOCAB_CHUNK if on_gpu else CPU_VOCAB_CHUNK)
    head_work = logits_bytes(
        shape, min(logprob_chunk_size, micro_batch_tokens), vocab_chunk=vocab_chunk, precision=precision
    )
    head_work += (
        2 * FP32_BYTES * micro_batch_tokens * shape.hidden_size
    )  # the gradient of the hidden states, as it is summed and as it is passed on
    # The head's whole gradient, before it is added to that of earlier micro-batches. A sharded one stays gathered, and is counted there.
    head_work += 0 if is_sharded else FP32_BYTES * shape.head_params
    # Afterwards, when nothing is left of the micro-batch: the last gradients are scattered, and on CUDA AdamW takes the square roots of all weights at once.
    afterwards = max(
        _scatter_bytes(shape, precision) if is_sharded else 0,
        copy if on_gpu and optimizer_bytes_per_param >= ADAM_BYTES else 0,
    )
    return TrainingMemory(
        weights_bytes=copy,
        gradients_bytes=copy,
        optimizer_bytes=optimizer_bytes_per_param * copy / FP32_BYTES,
        buckets_bytes=copy if strategy == "ddp" else 0,
        # Autocast's copies live as long as the backward pass needs them: of all layers, or with checkpointing of one at a time. The head is cast by tiles.
        cast_weights_bytes=BF16_BYTES * (1 if checkpointing else shape.num_layers) * shape.layer_params
        if precision == AUTOCAST
        else 0,
        gathered_bytes=gathered,
        activations_bytes=activations,
        masks_bytes=masks,
        work_bytes=max(layer_work, head_work, afterwards - gathered - activations - masks),
    )


def layer_activation_bytes(shape: ModelShape, *, precision: Precision) -> int:
    """What one decoder layer keeps of one token for its backward pass.

    A norm keeps its input in fp32, its normalised form, and one fp32 number. Autocast casts a layer's input once for each product that takes it: q, k and v,
    gate and up have copies of their own. Attention keeps q, k, v, its output and one fp32 number a head, on CPU and CUDA alike.
    """
    hidden, attention, inner, width = (
        shape.hidden_size,
        shape.attention_width,
        shape.intermediate_size,
        precision.compute_bytes,
    )
    norms = 2 * _norm_bytes(shape, precision)
    inputs = (5 if precision == AUTOCAST else 2) * width * hidden
    attention_bytes = 2 * width * (attention + shape.kv_width) + FP32_BYTES * shape.num_heads
    mlp = 4 * width * inner  # gate, its activation, up, their product
    qk_norms = 0
    if shape.has_qk_norm:
        num_heads = (attention + shape.kv_width) // shape.head_dim
        qk_norms = (FP32_BYTES + width) * (attention + shape.kv_width) + FP32_BYTES * num_heads
    return norms + inputs + attention_bytes + mlp + qk_norms


def _norm_bytes(shape: ModelShape, precision: Precision) -> int:
    return (FP32_BYTES + precision.stream_bytes) * shape.hidden_size + FP32_BYTES


def activation_bytes(shape: ModelShape, num_tokens: int, *, precision: Precision, checkpointing: bool) -> int:
    """What the backbone keeps for its backward pass, attention masks apart: its layers, or with checkpointing their inputs; the last norm; the rotary tables."""
    width = precision.stream_bytes
    layer = width * shape.hidden_size if checkpointing else layer_activation_bytes(shape, precision=precision)
    rotary = 2 * width * shape.head_dim
    return num_tokens * (shape.num_layers * layer + _norm_bytes(shape, precision) + rotary)


def block_mask_bytes(num_tokens: int) -> int:
    """CUDA's mask of a tree: for the rows and for the columns of its blocks the list of the partial and of the full ones, int32."""
    num_blocks = -(-num_tokens // BLOCK)
    return 4 * 4 * num_blocks * (num_blocks + 1)


def logits_bytes(shape: ModelShape, chunk_tokens: int, *, vocab_chunk: int, precision: Precision) -> int:
    """`policy/logprobs.py` at work on one tile: its logits and their exponentials in fp32, and of the rows of the weight, where the widths differ, a cast copy,
    the sum of their gradient in fp32, and what is added to it."""
    tile = 2 * FP32_BYTES * chunk_tokens * vocab_chunk
    width = precision.compute_bytes
    cast = width if precision.stream_bytes != width else 0
    sum_and_addend = (0 if precision.stream_bytes == FP32_BYTES else FP32_BYTES) + (
        0 if width == FP32_BYTES else width
    )
    return tile + (cast + sum_and_addend) * vocab_chunk * shape.hidden_size


def _layer_work_bytes(
    shape: ModelShape, num_tokens: int, *, precision: Precision, checkpointing: bool
) -> int:
    """With checkpointing the layer that is computed again; and the gradients that are alive at a time in its feed-forward part, where they are most."""
    again = layer_activation_bytes(shape, precision=precision) if checkpointing else 0
    return num_tokens * (
        again
        + 3 * precision.compute_bytes * shape.intermediate_size
        + 2 * precision.stream_bytes * shape.hidden_size
    )


def _gathered_bytes(shape: ModelShape, precision: Precision) -> int:
    """Embedding and head stay gathered for the whole pass, and so does the head's gradient; two layers (one is fetched ahead), one layer's gradient, and the
    same in fp32 while it is scattered."""
    return (
        precision.stream_bytes * (shape.outer_params + shape.head_params + 3 * shape.layer_params)
        + FP32_BYTES * shape.layer_params
    )


def _scatter_bytes(shape: ModelShape, precision: Precision) -> int:
    """The end of a backward pass under FSDP2: embedding and head, their gradients, and those in fp32 while they are scattered."""
    return (2 * precision.stream_bytes + FP32_BYTES) * shape.outer_params


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
    return EngineMemory(
        weights_bytes=weights_bytes, kv_cache_bytes=room, workspace_bytes=ENGINE_WORKSPACE_BYTES
    )
