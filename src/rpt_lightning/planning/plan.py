"""Combine a run's settings, model sizes and tokens into memory, operations and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rpt_lightning.planning.alternatives import Alternative, Outcome, alternatives
from rpt_lightning.planning.devices import Device
from rpt_lightning.planning.memory import (
    CUDA_GRAPHS_BYTES,
    GPU_OVERHEAD_BYTES,
    STRATEGIES,
    EngineMemory,
    Strategy,
    TrainingMemory,
    training_memory,
    vllm_gpu_memory,
)
from rpt_lightning.planning.model_shape import ModelShape
from rpt_lightning.planning.settings import Rates, RunSettings
from rpt_lightning.planning.times import (
    StepTimes,
    StepTraffic,
    busiest_completions,
    num_passes_of_training,
    prefill_work,
    step_times,
    step_traffic,
)
from rpt_lightning.planning.workload import StepTokens, step_tokens
from rpt_lightning.policy.flops import forward_flops, train_flops
from rpt_lightning.types import TokenIds


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of a step, over all ranks."""

    train_shared_flops: float
    train_plain_flops: float
    prefill_flops: float
    decode_flops: float


@dataclass(frozen=True, kw_only=True)
class MemoryFit:
    """Memory of training under one strategy on one device, and of the engine.

    The engine shares that device or has one of its own.
    """

    strategy: Strategy
    training: TrainingMemory
    engine: EngineMemory
    is_apart: bool  # the engine runs on a server
    sleeps: bool  # the engine frees its memory while the policy trains
    sequence_cache_bytes: (
        float  # of the longest prompt and completion; an engine with a smaller cache refuses to start
    )
    overhead_bytes: float
    device_bytes: float

    @property
    def total_bytes(self) -> float:
        """Bytes at the fullest moment: of training, or of generation if the engine sleeps during training."""
        training, engine = self.training.total_bytes, 0 if self.is_apart else self.engine.total_bytes
        together = max(training, self.training.lasting_bytes + engine) if self.sleeps else training + engine
        return together + self.overhead_bytes

    @property
    def engine_starts(self) -> bool:
        return self.engine.kv_cache_bytes >= self.sequence_cache_bytes

    @property
    def fits(self) -> bool:
        return self.engine_starts and self.total_bytes <= self.device_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `rpt plan` reports."""

    settings: RunSettings
    shape: ModelShape
    device: Device
    rates: Rates
    tokens: StepTokens
    memory: tuple[MemoryFit, ...]  # single, ddp, fsdp2, as configured
    memory_other: tuple[MemoryFit, ...]  # the same with activation checkpointing switched
    flops: StepFlops
    times: StepTimes
    concurrent_sequences: float  # completions that a device decodes at the same time
    traffic: StepTraffic
    alternatives: tuple[Alternative, ...]  # other arrangements that fit

    @property
    def fit(self) -> MemoryFit:
        """The memory fit of the configured strategy."""
        return self.memory[STRATEGIES.index(self.settings.strategy)]


def make_plan(
    settings: RunSettings,
    shape: ModelShape,
    device: Device,
    rates: Rates,
    prompts: Sequence[TokenIds],
    *,
    completion_tokens: int,
    live_frac: float,
) -> Plan:
    """Make the plan of one step with the given prompts.

    Each completion is assumed to have ``completion_tokens`` tokens.
    """
    tokens = step_tokens(
        prompts,
        group_size=settings.group_size,
        completion_tokens=completion_tokens,
        live_frac=live_frac,
        micro_batch_tokens=settings.micro_batch_tokens,
        num_ranks=settings.num_ranks,
        on_gpu=settings.on_gpu,
        trains_contexts=settings.trains_contexts,
    )
    engine = _engine_memory(settings, shape, device)
    concurrent = _concurrent_sequences(settings, shape, engine, tokens)

    def outcome(changed: RunSettings) -> Outcome | None:
        engine = _engine_memory(changed, shape, device)
        fits = _memory(changed, shape, device, engine, tokens, checkpointing=changed.checkpointing)
        fit = fits[STRATEGIES.index(changed.strategy)]
        if not fit.engine_starts:
            return None
        concurrent = _concurrent_sequences(changed, shape, engine, tokens)
        step_s = step_times(changed, shape, device, rates, tokens, concurrent).step_s
        return fit.total_bytes, fit.device_bytes, concurrent, step_s

    return Plan(
        settings=settings,
        shape=shape,
        device=device,
        rates=rates,
        tokens=tokens,
        memory=_memory(settings, shape, device, engine, tokens, checkpointing=settings.checkpointing),
        memory_other=_memory(
            settings, shape, device, engine, tokens, checkpointing=not settings.checkpointing
        ),
        flops=_flops(settings, shape, tokens),
        times=step_times(settings, shape, device, rates, tokens, concurrent),
        concurrent_sequences=concurrent,
        traffic=step_traffic(settings, shape, tokens, rates),
        alternatives=tuple(alternatives(settings, outcome)),
    )


def _engine_memory(settings: RunSettings, shape: ModelShape, device: Device) -> EngineMemory:
    weights = settings.engine_dtype_bytes * shape.num_params
    if settings.engine == "servers" or (settings.engine == "vllm" and settings.on_gpu):
        return vllm_gpu_memory(
            weights, device_bytes=device.memory_bytes, utilization=settings.gpu_memory_utilization
        )
    batch_tokens = max(
        settings.max_batch_tokens, settings.longest_sequence
    )  # a sequence longer than the budget forms its own batch
    cache = (
        settings.kv_cache_bytes
        if settings.engine == "vllm"
        else batch_tokens * shape.kv_cache_bytes(settings.engine_dtype_bytes)
    )
    return EngineMemory(weights_bytes=weights, kv_cache_bytes=cache, workspace_bytes=0)


def _memory(
    settings: RunSettings,
    shape: ModelShape,
    device: Device,
    engine: EngineMemory,
    tokens: StepTokens,
    *,
    checkpointing: bool,
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
                cpu_offload=settings.cpu_offload,
                offload_moments=settings.offload_moments,
                is_fused=settings.is_fused,
            ),
            engine=engine,
            is_apart=settings.num_servers > 0,
            sleeps=settings.engine_sleeps,
            sequence_cache_bytes=settings.longest_sequence
            * shape.kv_cache_bytes(settings.engine_dtype_bytes),
            overhead_bytes=_overhead_bytes(settings),
            device_bytes=device.memory_bytes,
        )
        for strategy in STRATEGIES
    )


def _overhead_bytes(settings: RunSettings) -> float:
    if not settings.on_gpu:
        return 0
    return GPU_OVERHEAD_BYTES + (CUDA_GRAPHS_BYTES if settings.engine == "vllm" else 0)


def _concurrent_sequences(
    settings: RunSettings, shape: ModelShape, engine: EngineMemory, tokens: StepTokens
) -> float:
    """Return the number of completions that a device decodes at the same time.

    It is limited by the device's completions, by what the engine takes, and by what the cache holds when the
    completions are half done.
    """
    completions = busiest_completions(settings, tokens)
    if settings.engine not in ("vllm", "servers"):
        return max(1, min(completions, settings.max_batch_tokens // settings.longest_sequence))
    prompt_tokens = tokens.mean_prompt_tokens / (settings.group_size if settings.shares_prefill else 1)
    sequence_bytes = shape.kv_cache_bytes(settings.engine_dtype_bytes) * (
        prompt_tokens + tokens.completion_tokens / 2
    )
    return max(1, min(completions, settings.max_num_seqs, engine.kv_cache_bytes / sequence_bytes))


def _flops(settings: RunSettings, shape: ModelShape, tokens: StepTokens) -> StepFlops:
    passes = num_passes_of_training(settings)
    return StepFlops(
        train_shared_flops=passes * train_flops(shape.size, tokens.packed),
        train_plain_flops=passes * train_flops(shape.size, tokens.plain),
        prefill_flops=forward_flops(shape.size, prefill_work(settings, tokens)),
        decode_flops=forward_flops(shape.size, tokens.sampling),
    )
