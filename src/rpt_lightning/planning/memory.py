"""Memory of one device at its fullest, part by part.

The terms follow, tensor by tensor, what this code and transformers' Llama, Qwen2 and Qwen3 layers keep for
the backward pass. Tests compare them with the tensors that autograd actually saves. They also compare the sum
with a real training process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rpt_lightning.planning.model_shape import ModelShape
from rpt_lightning.policy.attention.block_mask import BLOCK
from rpt_lightning.policy.logprobs import CPU_VOCAB_CHUNK, VOCAB_CHUNK

Strategy = Literal["single", "ddp", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = ("single", "ddp", "fsdp2")
FP32_BYTES = 4
BF16_BYTES = 2
ADAM_BYTES = 2 * FP32_BYTES
# Besides its weights vLLM keeps room for its own activations and CUDA graphs. This assumption is in the range
# that its start-up log reports.
ENGINE_WORKSPACE_BYTES = 2 * 2**30
# The graphs of vLLM in the trainer, on a GPU. They lie outside of its share of the device, and stay while it
# sleeps. This is an assumption.
CUDA_GRAPHS_BYTES = 1.5 * 2**30
# CUDA's context, NCCL's buffers and memory that the allocator cannot reuse. This is an assumption.
GPU_OVERHEAD_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Byte widths in a step's computation. The weights that the optimizer updates are always fp32.

    An adapter's base may be held in bf16 (``ModelShape.bf16_params``).
    """

    compute_bytes: int  # of a matrix product
    # Of the activations that run from layer to layer, and of the weights as a layer sees them.
    stream_bytes: int


FP32 = Precision(compute_bytes=FP32_BYTES, stream_bytes=FP32_BYTES)
AUTOCAST = Precision(compute_bytes=BF16_BYTES, stream_bytes=FP32_BYTES)
GATHERED_BF16 = Precision(
    compute_bytes=BF16_BYTES, stream_bytes=BF16_BYTES
)  # FSDP2 gives the layers bf16 weights


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Training memory of one device.

    The first group of fields is always present, the second at the fullest moment of a step.
    """

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    buckets_bytes: float  # DDP's second copy of the gradients

    cast_weights_bytes: float  # autocast's 16-bit copy of the weights
    gathered_bytes: float  # what FSDP2 holds gathered at the same time
    activations_bytes: float  # kept for the backward pass
    masks_bytes: float
    # In addition: the largest of the work on a layer, on the head, and in the optimizer's step.
    work_bytes: float

    @property
    def lasting_bytes(self) -> float:
        """Bytes that remain between two training phases. Gradients are freed after each step."""
        return self.weights_bytes + self.optimizer_bytes + self.buckets_bytes

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
    offload_moments: bool = False,
    is_fused: bool = False,
) -> TrainingMemory:
    """Work out the training memory of one device.

    Args:
        shape: Sizes of the policy. With an adapter, only the adapter has gradients and an optimizer.
        strategy: "single" and "ddp" hold everything on each device. "fsdp2" shards weights, gradients and
            optimizer over the ranks.
        num_ranks: Number of data-parallel ranks.
        micro_batch_tokens: Tokens of the largest micro-batch. In the worst case all of them are scored.
        masked_pairs: Pairs that attention on CPU computes under a mask (``StepTokens``).
        precision: FP32, AUTOCAST or, only with "fsdp2", GATHERED_BF16.
        checkpointing: Whether layers are recomputed in the backward pass.
        optimizer_bytes_per_param: Size of the optimizer's state; 8 for AdamW.
        logprob_chunk_size: Tokens whose logits exist at the same time.
        on_gpu: Whether the GPU kernels run.
        cpu_offload: With "fsdp2", whether weights, gradients and optimizer are in host memory. The optimizer
            then steps there.
        offload_moments: Whether the optimizer's state is on the device only during its step.
        is_fused: Whether the optimizer is torch's fused one, which needs no memory beside its state.
    """
    is_sharded = strategy == "fsdp2"
    share = (0.0 if cpu_offload else 1 / num_ranks) if is_sharded else 1.0
    copy = FP32_BYTES * shape.trained_params * share
    gathered = _gathered_bytes(shape, precision) if is_sharded else 0
    activations = activation_bytes(
        shape, micro_batch_tokens, precision=precision, checkpointing=checkpointing
    )
    activations += precision.compute_bytes * micro_batch_tokens * shape.hidden_size  # the head's input
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
    )  # the gradient of the hidden states, once as it is summed and once as it is passed on
    # The head's whole gradient, before it is added to that of earlier micro-batches. A sharded one stays
    # gathered and is counted there.
    head_work += 0 if is_sharded or shape.has_adapter else FP32_BYTES * shape.head_params
    # Afterwards, when the micro-batch is gone, the last gradients are scattered. Then the moments come from
    # the host, and on CUDA an AdamW that is not fused takes the square roots of all weights at once.
    moments = optimizer_bytes_per_param * copy / FP32_BYTES
    roots = copy if on_gpu and not is_fused and optimizer_bytes_per_param >= ADAM_BYTES else 0
    afterwards = max(
        _scatter_bytes(shape, precision) if is_sharded else 0, roots + (moments if offload_moments else 0)
    )
    return TrainingMemory(
        weights_bytes=shape.held_bytes * share,
        gradients_bytes=copy,
        optimizer_bytes=0 if offload_moments else moments,
        buckets_bytes=copy if strategy == "ddp" else 0,
        # Autocast's copies live as long as the backward pass needs them: those of all layers or, with
        # checkpointing, of one at a time. The head is cast by tiles.
        cast_weights_bytes=_cast_weights_bytes(shape, checkpointing=checkpointing)
        if precision == AUTOCAST
        else 0,
        gathered_bytes=gathered,
        activations_bytes=activations,
        masks_bytes=masks,
        work_bytes=max(layer_work, head_work, afterwards - gathered - activations - masks),
    )


def _cast_weights_bytes(shape: ModelShape, *, checkpointing: bool) -> float:
    """Count the bytes of autocast's copies: of fp32 weights in the layers, and of the adapter."""
    num_layers = 1 if checkpointing else shape.num_layers
    layer = 0 if shape.bf16_params else shape.layer_params
    return BF16_BYTES * num_layers * (layer + shape.adapter_params / shape.num_layers)


def layer_activation_bytes(shape: ModelShape, *, precision: Precision) -> int:
    """Count the bytes that one decoder layer keeps for its backward pass, for one token.

    A norm keeps its input in fp32, its normalised form, and one fp32 number. Autocast casts a layer's input
    once for each product that takes it: q, k and v, and gate and up, have their own copies. Attention keeps
    q, k, v, its output and one fp32 number for each head, on CPU and CUDA alike.

    With an adapter, A keeps the input of a layer in place of its frozen matrix, and B keeps what A computes.
    A frozen norm does not keep the normalised form. If some layers have no adapter, this is too much.
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
        kept = FP32_BYTES + (0 if shape.has_adapter else width)
        qk_norms = kept * (attention + shape.kv_width) + FP32_BYTES * num_heads
    low_rank = width * shape.adapter_rank * shape.adapter_targets
    return norms + inputs + attention_bytes + mlp + qk_norms + low_rank


def _norm_bytes(shape: ModelShape, precision: Precision) -> int:
    normalised = 0 if shape.has_adapter else precision.stream_bytes
    return (FP32_BYTES + normalised) * shape.hidden_size + FP32_BYTES


def activation_bytes(shape: ModelShape, num_tokens: int, *, precision: Precision, checkpointing: bool) -> int:
    """Count the bytes that the backbone keeps for its backward pass, without attention masks.

    It keeps its layers (only their inputs with checkpointing), the last norm and the rotary tables.
    """
    width = precision.stream_bytes
    layer = width * shape.hidden_size if checkpointing else layer_activation_bytes(shape, precision=precision)
    rotary = 2 * width * shape.head_dim
    return num_tokens * (shape.num_layers * layer + _norm_bytes(shape, precision) + rotary)


def block_mask_bytes(num_tokens: int) -> int:
    """Count the bytes of CUDA's mask of a tree.

    The mask has int32 lists of the partial and of the full blocks, for the rows and for the columns.
    """
    num_blocks = -(-num_tokens // BLOCK)
    return 4 * 4 * num_blocks * (num_blocks + 1)


def logits_bytes(shape: ModelShape, chunk_tokens: int, *, vocab_chunk: int, precision: Precision) -> int:
    """Count the bytes that `policy/logprobs.py` uses for one tile.

    They are the tile's logits and their exponentials in fp32. For the rows of the weight there are also a
    cast copy (if the widths differ), the sum of their gradient in fp32, and the term that is added to it.
    """
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
    """Count the bytes of the work on a layer.

    They are the gradients that are alive at the same time in its feed-forward part, where they are largest.
    With checkpointing, the recomputed layer is added. An adapter computes its output beside the layer's.
    """
    again = layer_activation_bytes(shape, precision=precision) if checkpointing else 0
    return num_tokens * (
        again
        + (4 if shape.has_adapter else 3) * precision.compute_bytes * shape.intermediate_size
        + 2 * precision.stream_bytes * shape.hidden_size
    )


def _gathered_bytes(shape: ModelShape, precision: Precision) -> int:
    """Count the bytes that FSDP2 holds gathered.

    The head stays gathered for the whole pass, and so does its gradient. An untied embedding is gathered only
    where it is used. To these come two layers (one is fetched ahead) and one layer's gradient, which is also
    in fp32 while it is scattered. Frozen weights have no gradients.
    """
    if shape.has_adapter:
        width = BF16_BYTES if shape.bf16_params else precision.stream_bytes
        per_layer = FP32_BYTES * shape.adapter_params // shape.num_layers
        return width * (shape.outer_params + 2 * shape.layer_params) + 3 * per_layer
    return (
        precision.stream_bytes * (2 * shape.head_params + 3 * shape.layer_params)
        + FP32_BYTES * shape.layer_params
    )


def _scatter_bytes(shape: ModelShape, precision: Precision) -> int:
    """Count the bytes at the end of a backward pass under FSDP2.

    They are embedding and head, their gradients, and the fp32 gradients while they are scattered.
    """
    if shape.has_adapter:
        return 0
    return (2 * precision.stream_bytes + FP32_BYTES) * shape.outer_params


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Memory of the engine on one device: its own copy of the weights, and cached keys and values."""

    weights_bytes: float
    kv_cache_bytes: float
    workspace_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.kv_cache_bytes + self.workspace_bytes


def vllm_gpu_memory(weights_bytes: float, *, device_bytes: float, utilization: float) -> EngineMemory:
    """Work out vLLM's memory on a GPU.

    vLLM takes its whole share of the device. The cache is what weights and workspace leave. It may be below
    0.
    """
    room = utilization * device_bytes - weights_bytes - ENGINE_WORKSPACE_BYTES
    return EngineMemory(
        weights_bytes=weights_bytes, kv_cache_bytes=room, workspace_bytes=ENGINE_WORKSPACE_BYTES
    )
