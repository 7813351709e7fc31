"""Estimate how long a step takes and what it sends, with simple models of the devices.

Operations run at a share of the peak, and bytes move at a share of a bandwidth. Nothing here was measured on
a GPU. A decoding pass either reads the weights and the cached keys and values once, or computes, whichever
takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from rpt_lightning.planning.devices import (
    DEVICES_PER_NODE,
    DIGEST_BYTES_PER_S,
    HOST_BANDWIDTH_BYTES_PER_S,
    NEW_MEMORY_BYTES_PER_S,
    NODE_LINK_BYTES_PER_S,
    Device,
)
from rpt_lightning.planning.memory import BF16_BYTES, FP32_BYTES, GATHERED_BF16
from rpt_lightning.planning.model_shape import ModelShape
from rpt_lightning.planning.settings import Rates, RunSettings
from rpt_lightning.planning.workload import StepTokens
from rpt_lightning.policy.flops import Work, forward_flops, train_flops
from rpt_lightning.rollout.weight_sync.folder_writer import WORTHWHILE

# AdamW on a CPU reads weight, gradient and two moments, and writes weight and moments.
_CPU_ADAM_BYTES = 7 * FP32_BYTES
# torch's unfused AdamW takes this many times as long on a CPU: 11.2 ns a weight against 1.4 on two cores.
_UNFUSED = 8


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Times of the busiest device. Computing and network overlap in training, but phases do not."""

    prefill_s: float
    decode_s: float
    decode_cache_frac: float  # share of keys and values in what decoding reads; the rest is weights
    # Of one completion of the maximum length, alone on a device. No step that draws one generates faster.
    longest_decode_s: float
    train_compute_s: float
    train_network_s: float
    # CPU offload: transfers between device and host, and the optimizer's work on the host. With offloaded
    # moments, their transfers.
    offload_s: float
    sync_s: float

    @property
    def generation_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def train_s(self) -> float:
        return max(self.train_compute_s, self.train_network_s) + self.offload_s

    @property
    def step_s(self) -> float:
        return self.generation_s + self.train_s + self.sync_s

    @property
    def overlapped_s(self) -> float:
        """Time of a step if the next rollouts were generated while the policy trains.

        That needs separate devices for generation.
        """
        return max(self.generation_s, self.train_s) + self.sync_s


@dataclass(frozen=True, kw_only=True)
class StepTraffic:
    """Bytes that one device sends (or receives) in a step."""

    train_bytes: float  # sent by a training device: weights gathered, gradients scattered
    gather_bytes: float  # sent by a training device: weights gathered for the sync and for the check after it
    server_bytes: float  # received by a server: the weights in the engine's dtype, or what changed in them


def step_traffic(settings: RunSettings, shape: ModelShape, tokens: StepTokens, rates: Rates) -> StepTraffic:
    """Count the bytes that devices send in a step.

    If the weights are sharded, every micro-batch sends its gradients in fp32 and gathers the weights twice.
    DDP sends the gradients once a step. Frozen weights have no gradients. The sync gathers sharded weights
    once more, in fp32. The check after the sync gathers embedding and head (the few other tensors are not
    counted).

    A ring moves (n - 1) / n of the whole for a gather or a scatter. It moves twice that to add up gradients
    that every rank keeps.
    """
    part = (settings.num_ranks - 1) / settings.num_ranks
    ring, gradient_ring = shape.num_params * part, shape.trained_params * part
    server = received_frac(settings, rates) * _engine_bytes(settings, shape) if settings.num_servers else 0
    if settings.strategy == "fsdp2":
        gather_bytes = BF16_BYTES if settings.precision("fsdp2") == GATHERED_BF16 else FP32_BYTES
        gathered = shape.held_bytes * part if shape.has_adapter else gather_bytes * ring
        train = (2 * gathered + FP32_BYTES * gradient_ring) * tokens.micro_batches
        return StepTraffic(
            train_bytes=train, gather_bytes=FP32_BYTES * ring * _gathered_for_sync(shape), server_bytes=server
        )
    return StepTraffic(train_bytes=2 * FP32_BYTES * gradient_ring, gather_bytes=0, server_bytes=server)


def _engine_bytes(settings: RunSettings, shape: ModelShape) -> float:
    """Return the size of all weights in the engine's dtype."""
    return settings.engine_dtype_bytes * shape.num_params


def received_frac(settings: RunSettings, rates: Rates) -> float:
    """Return the bytes that a server receives, as a share of all weights.

    A changed entry takes its size and a byte (rollout/weight_sync/patch.py). Patches that would take half of
    the weights or more are not sent.
    """
    if settings.transport == "nccl" or settings.full_every == 1:
        return 1.0
    patches = rates.changed_frac * (1 + 1 / settings.engine_dtype_bytes)
    return patches if patches < WORTHWHILE else 1.0


def _gathered_for_sync(shape: ModelShape) -> float:
    """Return what the sync gathers, in units of the whole model."""
    return 1 + shape.outer_params / shape.num_params


def prefill_work(settings: RunSettings, tokens: StepTokens) -> Work:
    """Return the work of reading the prompts, with or without a prefix cache."""
    return tokens.prefill if settings.shares_prefill else tokens.prefill_alone


def num_passes_of_training(settings: RunSettings) -> float:
    """Return the number of forward and backward passes.

    With several optimizer steps for each batch there is one more forward pass, for the log-probs before the
    update.
    """
    return 1 if settings.optimizer_steps_per_batch == 1 else 4 / 3


def busiest_completions(settings: RunSettings, tokens: StepTokens) -> int:
    """Return the completions of the device that generates most. The completions of a task stay together."""
    return -(-tokens.num_prompts // settings.num_generators) * settings.group_size


def mean_depth(tokens: StepTokens) -> float:
    """Return the mean number of tokens that a sampled token attends to."""
    return tokens.mean_prompt_tokens + tokens.completion_tokens / 2


def step_times(
    settings: RunSettings,
    shape: ModelShape,
    device: Device,
    rates: Rates,
    tokens: StepTokens,
    concurrent: float,
) -> StepTimes:
    """Estimate the times of a step, with ``concurrent`` completions decoded at a time on a device."""
    flops_per_s = rates.mfu * device.peak_flops
    bytes_per_s = rates.bandwidth_frac * device.bandwidth_bytes_per_s
    link_bytes_per_s = device.network_bytes_per_s(settings.num_ranks)
    completions = busiest_completions(settings, tokens)
    share = completions / tokens.num_completions
    traffic = step_traffic(settings, shape, tokens, rates)

    weights = settings.engine_dtype_bytes * (shape.body_params + shape.head_params)
    cached = concurrent * mean_depth(tokens) * shape.kv_cache_bytes(settings.engine_dtype_bytes)
    pass_flops = (
        concurrent
        * forward_flops(shape.size, tokens.sampling)
        / (tokens.num_completions * tokens.completion_tokens)
    )
    num_passes = completions * tokens.completion_tokens / concurrent

    # The trainer reads every weight in fp32 and writes it in the engine's dtype. A server that received it
    # reads and writes it once more.
    copies = (
        FP32_BYTES
        + settings.engine_dtype_bytes
        + (2 * settings.engine_dtype_bytes if settings.num_servers else 0)
    )
    return StepTimes(
        prefill_s=share * forward_flops(shape.size, prefill_work(settings, tokens)) / flops_per_s,
        decode_s=num_passes * max((weights + cached) / bytes_per_s, pass_flops / flops_per_s),
        decode_cache_frac=cached / (weights + cached),
        longest_decode_s=settings.max_completion_tokens * weights / bytes_per_s,
        train_compute_s=num_passes_of_training(settings)
        * train_flops(shape.size, tokens.busiest)
        / flops_per_s,
        train_network_s=traffic.train_bytes / link_bytes_per_s,
        offload_s=_offload_s(settings, shape, device, tokens)
        if settings.cpu_offload
        else _moments_s(settings, shape, device),
        sync_s=_gather_s(settings, shape, device, traffic)
        + _delivery_s(settings, shape, device, rates, traffic)
        + (shape.adapter_params if settings.syncs_adapter else shape.num_params) * copies / bytes_per_s,
    )


def _gather_s(settings: RunSettings, shape: ModelShape, device: Device, traffic: StepTraffic) -> float:
    """Return the seconds to gather the weights.

    With CPU offload, a rank's shard first moves to the device.
    """
    shard = (
        FP32_BYTES * shape.num_params / settings.num_ranks * _gathered_for_sync(shape)
        if settings.cpu_offload
        else 0
    )
    return shard / device.host_link_bytes_per_s + traffic.gather_bytes / device.network_bytes_per_s(
        settings.num_ranks
    )


def _delivery_s(
    settings: RunSettings, shape: ModelShape, device: Device, rates: Rates, traffic: StepTraffic
) -> float:
    """Return the seconds to bring the weights from the trainer to the servers.

    This is one broadcast, or a folder that the trainer writes once and every node of servers reads once. If
    only what changed is sent, then now and then the trainer also writes a full set that no server reads. The
    trainer brings all weights to its host and computes their digests, and so does every server, in reverse.
    """
    if not settings.num_servers:
        return 0
    if settings.transport == "nccl":
        return traffic.server_bytes / NODE_LINK_BYTES_PER_S
    nodes = -(-settings.num_servers // DEVICES_PER_NODE)
    stored = (1 + nodes) * traffic.server_bytes
    weights = _engine_bytes(settings, shape)
    if received_frac(settings, rates) < 1:
        stored += weights / settings.full_every
    hosts = 2 * weights * (1 / device.host_link_bytes_per_s + 1 / DIGEST_BYTES_PER_S)
    return stored / rates.storage_bytes_per_s + hosts


def _offload_s(settings: RunSettings, shape: ModelShape, device: Device, tokens: StepTokens) -> float:
    """Return the seconds that CPU offload adds.

    Every micro-batch brings a rank's fp32 shard to the device twice and takes its gradients back to the host.
    Those of the first go to pinned memory. Those of each later one go to new memory, while the device waits,
    and the host adds them (FSDP2's ``foreach_reduce``, torch 2.13). Last, the optimizer steps on the host.
    """
    shard = FP32_BYTES * shape.num_params / settings.num_ranks
    later = tokens.micro_batches - 1
    to_device = 2 * tokens.micro_batches * shard / device.host_link_bytes_per_s
    to_host = shard / device.host_link_bytes_per_s + later * shard / NEW_MEMORY_BYTES_PER_S
    additions = 3 * later * shard / HOST_BANDWIDTH_BYTES_PER_S
    step = _CPU_ADAM_BYTES / FP32_BYTES * shard / HOST_BANDWIDTH_BYTES_PER_S
    return to_device + to_host + additions + (1 if settings.is_fused else _UNFUSED) * step


def _moments_s(settings: RunSettings, shape: ModelShape, device: Device) -> float:
    """Return the seconds in which offloaded moments move to the device and back, once a step."""
    if not settings.offload_moments or not settings.on_gpu:
        return 0
    shards = settings.num_ranks if settings.strategy == "fsdp2" else 1
    moments = settings.optimizer_bytes_per_param * shape.num_params / shards
    return 2 * moments / device.host_link_bytes_per_s
