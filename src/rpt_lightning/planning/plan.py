"""Puts a run's settings, its model's sizes and its tokens together: memory, operations, times, and what limits the run first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rpt_lightning.planning.devices import Device
from rpt_lightning.planning.memory import (
    AUTOCAST,
    BF16_BYTES,
    FP32,
    FP32_BYTES,
    GATHERED_BF16,
    GPU_OVERHEAD_BYTES,
    STRATEGIES,
    EngineMemory,
    Precision,
    Strategy,
    TrainingMemory,
    training_memory,
    vllm_gpu_memory,
)
from rpt_lightning.planning.model_shape import ModelShape
from rpt_lightning.planning.workload import StepTokens, step_tokens
from rpt_lightning.policy.block_mask import bucket_length
from rpt_lightning.policy.flops import Work, forward_flops, train_flops
from rpt_lightning.types import TokenIds

EngineKind = Literal["vllm", "transformers", "other"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What the plan needs of a run's configuration."""

    tasks_per_step: int
    positions_per_document: int
    group_size: int
    max_prompt_tokens: int
    max_context_tokens: int | None
    max_completion_tokens: int
    micro_batch_tokens: int
    optimizer_steps_per_batch: int
    max_steps: int
    optimizer_bytes_per_param: float
    logprob_chunk_size: int
    is_mixed: bool  # bf16-mixed
    gathers_bf16: bool  # FSDP2, under bf16-mixed: weights are gathered in bf16, and the layers compute with those
    checkpointing: bool
    strategy: Strategy
    num_devices: int
    on_gpu: bool
    engine: EngineKind
    engine_dtype_bytes: int
    gpu_memory_utilization: float
    kv_cache_bytes: float  # of vLLM on CPU
    max_num_seqs: int  # of vLLM
    max_batch_tokens: int  # of transformers
    shares_prefill: bool

    @property
    def num_ranks(self) -> int:
        return 1 if self.strategy == "single" else self.num_devices

    @property
    def longest_sequence(self) -> int:
        return self.max_prompt_tokens + self.max_completion_tokens

    @property
    def largest_micro_batch(self) -> int:
        """The budget, or one sequence that is longer and gets a tree of its own; on GPUs with its padding."""
        tokens = max(self.micro_batch_tokens, self.longest_sequence)
        return bucket_length(tokens) if self.on_gpu else tokens

    def precision(self, strategy: Strategy) -> Precision:
        if not self.is_mixed:
            return FP32
        return GATHERED_BF16 if strategy == "fsdp2" and self.gathers_bf16 else AUTOCAST


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What share of a device's peaks is reached: an assumption."""

    mfu: float  # of the operations a second, by training and prefill
    bandwidth_frac: float  # of the memory bandwidth, by decoding


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Of all ranks together."""

    train_shared_flops: float
    train_plain_flops: float
    prefill_flops: float
    decode_flops: float


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Of the busiest device. Training is the longer of computing and network, which overlap."""

    prefill_s: float
    decode_s: float
    decode_cache_frac: float  # of what decoding reads, the keys and values; the rest is weights
    train_compute_s: float
    train_network_s: float
    sync_s: float

    @property
    def generation_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def train_s(self) -> float:
        return max(self.train_compute_s, self.train_network_s)

    @property
    def step_s(self) -> float:
        return self.generation_s + self.train_s + self.sync_s


@dataclass(frozen=True, kw_only=True)
class MemoryFit:
    """Training under one strategy beside the engine, on one device."""

    strategy: Strategy
    training: TrainingMemory
    engine: EngineMemory
    sequence_cache_bytes: float  # of the longest prompt and completion: an engine whose cache holds less refuses to start
    overhead_bytes: float
    device_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.training.total_bytes + self.engine.total_bytes + self.overhead_bytes

    @property
    def engine_starts(self) -> bool:
        return self.engine.kv_cache_bytes >= self.sequence_cache_bytes

    @property
    def fits(self) -> bool:
        return self.engine_starts and self.total_bytes <= self.device_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    settings: RunSettings
    shape: ModelShape
    device: Device
    rates: Rates
    tokens: StepTokens
    memory: tuple[MemoryFit, ...]  # single, ddp, fsdp2, as configured
    memory_other: tuple[MemoryFit, ...]  # the same with activation checkpointing the other way
    flops: StepFlops
    times: StepTimes
    concurrent_sequences: float  # that a device decodes at the same time
    network_bytes: float  # in and out of one device in a step

    @property
    def fit(self) -> MemoryFit:
        """Of the configured strategy."""
        return self.memory[STRATEGIES.index(self.settings.strategy)]


def make_plan(
    settings: RunSettings, shape: ModelShape, device: Device, rates: Rates, prompts: Sequence[TokenIds], *, completion_tokens: int, live_frac: float
) -> Plan:
    """The plan of one step, whose prompts are given and whose completions are assumed to have ``completion_tokens`` each."""
    tokens = step_tokens(
        prompts,
        group_size=settings.group_size,
        completion_tokens=completion_tokens,
        live_frac=live_frac,
        micro_batch_tokens=settings.micro_batch_tokens,
        num_ranks=settings.num_ranks,
        on_gpu=settings.on_gpu,
    )
    engine = _engine_memory(settings, shape, device)
    concurrent = _concurrent_sequences(settings, shape, engine, tokens)
    return Plan(
        settings=settings,
        shape=shape,
        device=device,
        rates=rates,
        tokens=tokens,
        memory=_memory(settings, shape, device, engine, tokens, checkpointing=settings.checkpointing),
        memory_other=_memory(settings, shape, device, engine, tokens, checkpointing=not settings.checkpointing),
        flops=_flops(settings, shape, tokens),
        times=_times(settings, shape, device, rates, tokens, concurrent),
        concurrent_sequences=concurrent,
        network_bytes=sum(_network_bytes(settings, shape, tokens)),
    )


def _engine_memory(settings: RunSettings, shape: ModelShape, device: Device) -> EngineMemory:
    weights = settings.engine_dtype_bytes * shape.num_params
    if settings.engine == "vllm" and settings.on_gpu:
        return vllm_gpu_memory(weights, device_bytes=device.memory_bytes, utilization=settings.gpu_memory_utilization)
    batch_tokens = max(settings.max_batch_tokens, settings.longest_sequence)  # a sequence longer than the budget is a batch of its own
    cache = settings.kv_cache_bytes if settings.engine == "vllm" else batch_tokens * shape.kv_cache_bytes(settings.engine_dtype_bytes)
    return EngineMemory(weights_bytes=weights, kv_cache_bytes=cache, workspace_bytes=0)


def _memory(
    settings: RunSettings, shape: ModelShape, device: Device, engine: EngineMemory, tokens: StepTokens, *, checkpointing: bool
) -> tuple[MemoryFit, ...]:
    return tuple(
        MemoryFit(
            strategy=strategy,
            training=training_memory(
                shape,
                strategy=strategy,
                num_ranks=settings.num_devices,
                micro_batch_tokens=settings.largest_micro_batch,
                masked_pairs=tokens.masked_pairs,
                precision=settings.precision(strategy),
                checkpointing=checkpointing,
                optimizer_bytes_per_param=settings.optimizer_bytes_per_param,
                logprob_chunk_size=settings.logprob_chunk_size,
                on_gpu=settings.on_gpu,
            ),
            engine=engine,
            sequence_cache_bytes=settings.longest_sequence * shape.kv_cache_bytes(settings.engine_dtype_bytes),
            overhead_bytes=GPU_OVERHEAD_BYTES if settings.on_gpu else 0,
            device_bytes=device.memory_bytes,
        )
        for strategy in STRATEGIES
    )


def _concurrent_sequences(settings: RunSettings, shape: ModelShape, engine: EngineMemory, tokens: StepTokens) -> float:
    """Completions that a device decodes at the same time: as many as it has, the engine takes, and the cache holds when they are half done."""
    if settings.engine != "vllm":
        return max(1, min(tokens.busiest_completions, settings.max_batch_tokens // settings.longest_sequence))
    prompt_tokens = tokens.mean_prompt_tokens / (settings.group_size if settings.shares_prefill else 1)
    sequence_bytes = shape.kv_cache_bytes(settings.engine_dtype_bytes) * (prompt_tokens + tokens.completion_tokens / 2)
    return max(1, min(tokens.busiest_completions, settings.max_num_seqs, engine.kv_cache_bytes / sequence_bytes))


def _prefill(settings: RunSettings, tokens: StepTokens) -> Work:
    return tokens.prefill if settings.shares_prefill else tokens.prefill_alone


def _flops(settings: RunSettings, shape: ModelShape, tokens: StepTokens) -> StepFlops:
    passes = _passes(settings)
    return StepFlops(
        train_shared_flops=passes * train_flops(shape.size, tokens.packed),
        train_plain_flops=passes * train_flops(shape.size, tokens.plain),
        prefill_flops=forward_flops(shape.size, _prefill(settings, tokens)),
        decode_flops=forward_flops(shape.size, tokens.sampling),
    )


def _passes(settings: RunSettings) -> float:
    """In forward and backward passes: with several optimizer steps a batch there is a forward pass more, for the log-probs before the update."""
    return 1 if settings.optimizer_steps_per_batch == 1 else 4 / 3


def _mean_depth(tokens: StepTokens) -> float:
    """Tokens that a sampled token attends to."""
    return tokens.mean_prompt_tokens + tokens.completion_tokens / 2


def _network_bytes(settings: RunSettings, shape: ModelShape, tokens: StepTokens) -> tuple[float, float]:
    """Sent by one device in a step: (training, sync).

    Every micro-batch sends its gradients in fp32 and, sharded, gathers the weights twice; the sync gathers them once more, in fp32. A ring moves (n - 1) / n of
    the whole for a gather or a scatter, and twice that to add up gradients that everyone keeps.
    """
    ring = shape.num_params * (settings.num_ranks - 1) / settings.num_ranks
    if settings.strategy == "fsdp2":
        gather_bytes = BF16_BYTES if settings.precision("fsdp2") == GATHERED_BF16 else FP32_BYTES
        return (2 * gather_bytes + FP32_BYTES) * ring * tokens.micro_batches, FP32_BYTES * ring
    return 2 * FP32_BYTES * ring * tokens.micro_batches, 0


def _times(settings: RunSettings, shape: ModelShape, device: Device, rates: Rates, tokens: StepTokens, concurrent: float) -> StepTimes:
    flops_per_s = rates.mfu * device.peak_flops
    bytes_per_s = rates.bandwidth_frac * device.bandwidth_bytes_per_s
    link_bytes_per_s = device.network_bytes_per_s(settings.num_ranks)
    flops = _flops(settings, shape, tokens)
    share = tokens.busiest_completions / tokens.num_completions  # of the generation, that the busiest device has
    network = _network_bytes(settings, shape, tokens)

    cached = concurrent * _mean_depth(tokens) * shape.kv_cache_bytes(settings.engine_dtype_bytes)
    pass_bytes = settings.engine_dtype_bytes * (shape.body_params + shape.head_params) + cached
    pass_flops = concurrent * flops.decode_flops / (tokens.num_completions * tokens.completion_tokens)
    num_passes = tokens.busiest_completions * tokens.completion_tokens / concurrent

    recompute = 4 / 3 if settings.checkpointing else 1
    return StepTimes(
        prefill_s=share * flops.prefill_flops / flops_per_s,
        decode_s=num_passes * max(pass_bytes / bytes_per_s, pass_flops / flops_per_s),
        decode_cache_frac=cached / pass_bytes,
        train_compute_s=recompute * _passes(settings) * train_flops(shape.size, tokens.busiest) / flops_per_s,
        train_network_s=network[0] / link_bytes_per_s,
        # Every weight is read in fp32 and written in the engine's dtype.
        sync_s=network[1] / link_bytes_per_s + shape.num_params * (FP32_BYTES + settings.engine_dtype_bytes) / bytes_per_s,
    )
