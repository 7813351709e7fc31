"""Settings of a run that a plan needs, and its assumptions about the devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rpt_lightning.planning.memory import AUTOCAST, FP32, GATHERED_BF16, Precision, Strategy
from rpt_lightning.policy.attention.block_mask import bucket_length

EngineKind = Literal["vllm", "servers", "transformers", "other"]
TransportKind = Literal["nccl", "folder"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The parts of a run's configuration that a plan needs."""

    tasks_per_step: int
    positions_per_document: int
    group_size: int
    max_prompt_tokens: int
    max_context_tokens: int | None
    max_completion_tokens: int
    micro_batch_tokens: int
    optimizer_steps_per_batch: int
    max_steps: int
    trains_contexts: bool = False  # model.ntp_weight is above 0
    optimizer_bytes_per_param: float
    is_fused: bool  # the optimizer is torch's fused one
    logprob_chunk_size: int
    is_mixed: bool  # bf16-mixed
    gathers_bf16: bool  # FSDP2 under bf16-mixed: weights are gathered in bf16, and the layers compute in bf16
    cpu_offload: bool  # FSDP2: weights, gradients and optimizer are in host memory
    offload_moments: bool = False  # the optimizer's moments are in host memory between its steps
    checkpointing: bool
    strategy: Strategy
    num_devices: int  # devices that train
    num_servers: int  # devices that only generate, each with a whole model; 0 if the training devices do
    on_gpu: bool
    engine: EngineKind
    transport: TransportKind  # how the weights get to the servers
    full_every: int = 1  # of a SharedFolderTransport: versions from one full set to the next
    engine_dtype_bytes: int
    gpu_memory_utilization: float  # of vLLM, in the trainer or on a server
    syncs_adapter: bool  # the engine gets the adapter alone, not merged weights
    engine_sleeps: bool  # vLLM in the trainer, on GPU: training and engine take turns with the memory
    kv_cache_bytes: float  # of vLLM on CPU
    max_num_seqs: int  # of vLLM
    max_batch_tokens: int  # of transformers
    shares_prefill: bool

    @property
    def num_ranks(self) -> int:
        return 1 if self.strategy == "single" else self.num_devices

    @property
    def num_generators(self) -> int:
        return self.num_servers or self.num_ranks

    @property
    def longest_sequence(self) -> int:
        return self.max_prompt_tokens + self.max_completion_tokens

    @property
    def largest_micro_batch(self) -> int:
        """The largest micro-batch in tokens: the budget, or a longer single sequence with a tree of its own.

        On GPUs it includes the padding.
        """
        tokens = max(self.micro_batch_tokens, self.longest_sequence)
        return bucket_length(tokens, self.micro_batch_tokens) if self.on_gpu else tokens

    def precision(self, strategy: Strategy) -> Precision:
        if not self.is_mixed:
            return FP32
        return GATHERED_BF16 if strategy == "fsdp2" and self.gathers_bf16 else AUTOCAST


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The assumed shares of a device's peaks that a run reaches."""

    # Of the peak operations per second, by training and prefill. Recomputed layers do not count.
    mfu: float
    bandwidth_frac: float  # of the memory bandwidth, by decoding
    storage_bytes_per_s: float = (
        10e9  # of the folder through which servers get weights, for all its readers together
    )
    changed_frac: float = 0.03  # of the weights, in the engine's dtype, from one version to the next
