"""``rpt plan`` estimates what a run of ``rpt fit`` with the same configuration will cost.

It parses the same files and flags, but builds neither model nor trainer.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, instantiate_class

from rpt_lightning.cli.run import RPTCLI, make_cli
from rpt_lightning.data.modules.tiers import Tiers
from rpt_lightning.objectives.thought_budget import ThoughtBudget
from rpt_lightning.planning.assumptions import assumptions
from rpt_lightning.planning.devices import DEVICES, Device, measured_cpu
from rpt_lightning.planning.memory import Strategy
from rpt_lightning.planning.model_shape import load_model_config, model_shape
from rpt_lightning.planning.plan import Plan, make_plan
from rpt_lightning.planning.plan_text import report
from rpt_lightning.planning.settings import EngineKind, Rates, RunSettings
from rpt_lightning.planning.workload import assumed_prompts
from rpt_lightning.policy.adapter import Adapter
from rpt_lightning.policy.logprobs import token_chunk
from rpt_lightning.pretrained.adapter_folder import base_of
from rpt_lightning.rollout.engines.vllm.vllm_engine import CPU_MAX_NUM_SEQS
from rpt_lightning.types import TokenIds

# RMT (arXiv:2509.24375) reports a mean of 872 tokens for next-token reasoning at the paper's limit of 8,192,
# before it shortens completions.
USUAL_COMPLETION_TOKENS = 1024

# `rpt serve` starts a server with this value by default.
SERVER_MAX_NUM_SEQS = 256

SHARDED = ("ModelParallelStrategy", "ShardedStrategy")


class PlanOptions:
    """Options of ``rpt plan``.

    Args:
        device: h100, h200, a100, l40s or cpu. cpu means this machine, whose speed is measured within a
            second. None means cpu if trainer.accelerator is cpu, and h100 otherwise.
        num_devices: Number of devices that train. None means trainer.devices x trainer.num_nodes, where
            "auto" counts as 1.
        num_servers: Number of devices that only generate, if rollout.engine is VLLMServerEngine. None means
            one for each of the engine's urls.
        gpu_memory_utilization: Fraction of a server's GPU memory that vLLM takes, as in
            serve.gpu_memory_utilization.
        model_config: Folder or config.json of the policy's model, if model.policy.path cannot be reached.
            Weights are never read.
        completion_tokens: Assumed mean length of a completion. None means half of
            rollout.sampling.max_completion_tokens, but at most 1024.
        context_tokens: Assumed mean length of a context if the task folder is missing. None means half of the
            longest.
        live_frac: Assumed fraction of groups whose rewards differ. The policy trains only on these.
        mfu: Assumed fraction of the device's peak that training and prefill reach. As in perf/mfu,
            layers that activation checkpointing computes again count only once.
        bandwidth_frac: Assumed fraction of the device's memory bandwidth that decoding reaches.
        shared_storage_gb_per_s: Assumed speed of the storage that holds a SharedFolderTransport's
            folder, in GB (10^9 bytes) per second, summed over all readers.
        changed_frac: Assumed fraction of the weights that change from one version to the next in the engine's
            dtype, as in sync/changed_frac. Published values are 1 to 3 % in bf16 at a learning rate of
            1e-6 (docs/weight-sync.md). A SharedFolderTransport sends only the changed weights.
    """

    def __init__(
        self,
        device: str | None = None,
        num_devices: int | None = None,
        num_servers: int | None = None,
        gpu_memory_utilization: float = 0.9,
        model_config: str | None = None,
        completion_tokens: int | None = None,
        context_tokens: int | None = None,
        live_frac: float = 1.0,
        mfu: float = 0.3,
        bandwidth_frac: float = 0.7,
        shared_storage_gb_per_s: float = 10.0,
        changed_frac: float = 0.03,
    ) -> None:
        if device is not None and device not in (*DEVICES, "cpu"):
            raise ValueError(f"--plan.device {device}: choose from {', '.join([*DEVICES, 'cpu'])}")
        numbers = {
            "num_devices": num_devices,
            "num_servers": num_servers,
            "completion_tokens": completion_tokens,
            "context_tokens": context_tokens,
        }
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"--plan.{name} {number}: must be at least 1")
        shares = {
            "live_frac": live_frac,
            "mfu": mfu,
            "bandwidth_frac": bandwidth_frac,
            "gpu_memory_utilization": gpu_memory_utilization,
            "changed_frac": changed_frac,
        }
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(f"--plan.{name} {share}: give a share above 0, at most 1")
        if shared_storage_gb_per_s <= 0:
            raise ValueError(f"--plan.shared_storage_gb_per_s {shared_storage_gb_per_s}: must be positive")
        self.device = device
        self.num_devices = num_devices
        self.num_servers = num_servers
        self.gpu_memory_utilization = gpu_memory_utilization
        self.model_config = model_config
        self.completion_tokens = completion_tokens
        self.context_tokens = context_tokens
        self.live_frac = live_frac
        self.mfu = mfu
        self.bandwidth_frac = bandwidth_frac
        self.shared_storage_gb_per_s = shared_storage_gb_per_s
        self.changed_frac = changed_frac


class PlanCLI(RPTCLI):
    """Parses a run and stops there."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(PlanOptions, "plan")

    def instantiate_classes(self) -> None:
        """Build nothing. The plan itself opens the data that it needs."""

    def seed_run(self) -> None:
        """Do nothing: nothing random is drawn."""


def run(args: list[str]) -> None:
    """Print the plan of a configuration."""
    # LightningCLI warns if both its args and the process's own are given.
    sys.argv = ["rpt"]
    print(plan_text(args))


def plan_text(args: list[str]) -> str:
    """The plan of the run that ``rpt fit ARGS`` would start."""
    plan, words = plan_of(parse(args))
    return report(plan, assumptions=words)


def parse(args: list[str]) -> Namespace:
    """The configuration of ``rpt plan ARGS``."""
    description = "Estimate the time and memory of `rpt fit` with the same flags. Loads no weights."
    return make_cli(PlanCLI, run=False, args=args, prog="rpt plan", description=description).config


def plan_of(config: Namespace) -> tuple[Plan, list[str]]:
    """The plan of a parsed configuration, and the assumptions behind it."""
    options = PlanOptions(**config.plan)
    settings = run_settings(config, options)
    policy = config.model.init_args.policy.init_args
    adapter = policy.get("adapter")
    shape = model_shape(
        load_model_config(options.model_config or base_of(policy.path)),
        None if adapter is None else Adapter(**adapter.as_dict()),
    )
    device = _device(options.device or ("h100" if settings.on_gpu else "cpu"), settings)
    prompts, source = _prompts(config, settings, options.context_tokens)
    completion_tokens = options.completion_tokens or min(
        USUAL_COMPLETION_TOKENS, -(-settings.max_completion_tokens // 2)
    )
    rates = Rates(
        mfu=options.mfu,
        bandwidth_frac=options.bandwidth_frac,
        storage_bytes_per_s=options.shared_storage_gb_per_s * 1e9,
        changed_frac=options.changed_frac,
    )
    plan = make_plan(
        settings,
        shape,
        device,
        rates,
        prompts,
        completion_tokens=completion_tokens,
        live_frac=options.live_frac,
    )
    words = assumptions(
        plan,
        live_frac=options.live_frac,
        replaces_groups=config.rollout.dynamic_sampling.from_step is not None,
    )
    return plan, [source, *words]


def run_settings(config: Namespace, options: PlanOptions) -> RunSettings:
    """The settings of a parsed configuration that matter for the plan.

    Raises:
        ValueError: The plan cannot estimate this run.
    """
    if not config.model.class_path.endswith(".RPTModule"):
        raise ValueError(
            f"--model {config.model.class_path}: rpt plan estimates runs that learn by reasoning (RPTModule)"
        )
    if config.data.class_path.endswith(".AnswerTaskDataModule"):
        raise ValueError(
            f"--data {config.data.class_path}: rpt plan estimates runs on task folders (TokenTaskDataModule)"
        )
    if config.rollout.engine is None:
        raise ValueError(
            "rollout.engine is not set, but RPTModule learns from rollouts; "
            "give one, e.g. --rollout.engine VLLMEngine"
        )
    model, data, rollout, trainer = (
        config.model.init_args,
        config.data.init_args,
        config.rollout,
        config.trainer,
    )
    policy, engine = model.policy.init_args, rollout.engine.get("init_args") or {}
    kinds: dict[str, EngineKind] = {
        "VLLMEngine": "vllm",
        "VLLMServerEngine": "servers",
        "HFEngine": "transformers",
    }
    kind = kinds.get(rollout.engine.class_path.rpartition(".")[2], "other")
    num_devices = options.num_devices or _num_devices(trainer)
    cpu_offload = _strategy_option(trainer.strategy, "cpu_offload", default=False)
    if cpu_offload and policy.get("adapter") is not None:
        raise ValueError(
            "--trainer.strategy.cpu_offload true: rpt plan does not estimate it with an adapter, whose "
            "gradients and optimizer are small; leave it out"
        )
    if kind != "servers" and options.num_servers is not None:
        raise ValueError(
            "--plan.num_servers: only rollout.engine VLLMServerEngine has servers; "
            "add --config configs/rollout/servers.yaml"
        )
    return RunSettings(
        tasks_per_step=data.tasks_per_step,
        positions_per_document=data.positions_per_document,
        group_size=rollout.group_size,
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_context_tokens=data.max_context_tokens,
        max_completion_tokens=rollout.sampling.max_completion_tokens,
        micro_batch_tokens=model.micro_batch_tokens,
        optimizer_steps_per_batch=model.optimizer_steps_per_batch,
        max_steps=trainer.max_steps,
        trains_contexts=model.ntp_weight > 0,
        optimizer_bytes_per_param=optimizer_bytes_per_param(model.optimizer),
        is_fused=bool((model.optimizer.get("init_args") or {}).get("fused")),
        logprob_chunk_size=policy.logprob_chunk_size or token_chunk(on_gpu=trainer.accelerator != "cpu"),
        is_mixed=trainer.precision == "bf16-mixed",
        gathers_bf16=_strategy_option(trainer.strategy, "gather_bf16", default=True),
        cpu_offload=cpu_offload,
        offload_moments=model.offload_moments,
        checkpointing=policy.activation_checkpointing,
        strategy=_strategy(trainer.strategy, num_devices=num_devices),
        num_devices=num_devices,
        num_servers=(options.num_servers or len(engine["urls"])) if kind == "servers" else 0,
        on_gpu=trainer.accelerator != "cpu",
        engine=kind,
        transport="nccl"
        if kind == "servers" and engine["transport"]["class_path"].endswith("NCCLTransport")
        else "folder",
        full_every=engine["transport"].get("init_args", {}).get("full_every", 1) if kind == "servers" else 1,
        engine_dtype_bytes=getattr(torch, engine.get("dtype", "bfloat16")).itemsize,
        gpu_memory_utilization=options.gpu_memory_utilization
        if kind == "servers"
        else engine.get("gpu_memory_utilization", 0.0),
        syncs_adapter=policy.get("adapter") is not None and engine.get("max_adapter_rank") is not None,
        engine_sleeps=kind == "vllm" and bool(engine.get("sleep_in_training")),
        kv_cache_bytes=engine.get("kv_cache_gib", 0.0) * 2**30,
        max_num_seqs=SERVER_MAX_NUM_SEQS
        if kind == "servers"
        else engine.get("max_num_seqs") or _engines_max_num_seqs(options.device, trainer.accelerator),
        max_batch_tokens=engine.get("max_batch_tokens", 0),
        shares_prefill=kind == "servers" or (kind == "vllm" and bool(engine.get("enable_prefix_caching"))),
    )


def _engines_max_num_seqs(device: str | None, accelerator: str) -> int:
    """What vLLM in the trainer takes if no number is given (vLLM 0.32 and 0.33, ``EngineArgs``)."""
    if accelerator == "cpu":
        return CPU_MAX_NUM_SEQS
    chip = DEVICES[device if device in DEVICES else "h100"]
    return 1024 if chip.memory_bytes >= 70 * 2**30 and "A100" not in chip.name else 256


def optimizer_bytes_per_param(config: Namespace) -> float:
    """Bytes of the optimizer's state per parameter, measured after a step of a real one on a small matrix."""
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = _build(config, [parameter])
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = [
        value
        for value in optimizer.state[parameter].values()
        if isinstance(value, torch.Tensor) and value.ndim > 0
    ]
    return sum(tensor.nbytes for tensor in tensors) / parameter.numel()


def _num_devices(trainer: Namespace) -> int:
    devices = trainer.devices
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, (list, tuple)):
        devices = len(devices)
    return (devices if isinstance(devices, int) and devices > 0 else 1) * trainer.num_nodes


def _strategy(strategy: str | Namespace, *, num_devices: int) -> Strategy:
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
    if name in SHARDED:
        parallel = 1 if isinstance(strategy, str) else strategy.init_args.tensor_parallel_size
        if parallel != 1:
            raise ValueError(
                f"trainer.strategy has tensor_parallel_size={parallel}: "
                "rpt plan estimates data-parallel sharding only; set it to 1"
            )
        return "fsdp2"
    if name.startswith(("ddp", "DDP")) or (name == "auto" and num_devices > 1):
        return "ddp"
    if name in ("auto", "single_device", "SingleDeviceStrategy"):
        return "single"
    raise ValueError(
        f"--trainer.strategy {name}: rpt plan knows one device (auto), ddp, "
        "and ModelParallelStrategy (configs/strategy/)"
    )


def _strategy_option(strategy: str | Namespace, name: str, *, default: bool) -> bool:
    """A flag of a sharded strategy, or the default if it is not given."""
    return (
        default if isinstance(strategy, str) else bool((strategy.get("init_args") or {}).get(name, default))
    )


def _device(name: str, settings: RunSettings) -> Device:
    if name != "cpu":
        return DEVICES[name]
    return measured_cpu(
        torch.bfloat16 if settings.is_mixed else torch.float32, num_processes=settings.num_ranks
    )


def _prompts(
    config: Namespace, settings: RunSettings, context_tokens: int | None
) -> tuple[list[TokenIds], str]:
    """The prompts of the run's first step, and their source."""
    folder = config.data.init_args.task_dir
    if os.path.isdir(folder) and context_tokens is None:
        data = _build(config.data)
        data.tiers = Tiers(**config.data.init_args.tiers.as_dict())
        data.setup("fit")
        objective = _build(config.rollout.objective)
        data.use_objective(objective)
        budget = ThoughtBudget(**config.rollout.thought_budget.as_dict())
        bound = objective.bind(data.train.tokenizer, budget)
        tasks = bound.posed(next(iter(data.train_dataloader())).tasks, step=0)
        prompts = [bound.prompt_ids(task) for task in tasks]
        missing = " (without the tasks that follow from its completions)" * objective.has_follow_ups
        return prompts, f"prompts: those of the run's first step, from {folder}{missing}"
    longest = settings.max_context_tokens or settings.max_prompt_tokens
    template_tokens = max(0, settings.max_prompt_tokens - longest)
    if context_tokens is not None and context_tokens > longest:
        raise ValueError(
            f"--plan.context_tokens {context_tokens}: contexts are cut to {longest} tokens; "
            "give that number or less"
        )
    mean = context_tokens or -(-longest // 2)
    prompts = assumed_prompts(
        num_tasks=settings.tasks_per_step,
        positions_per_document=settings.positions_per_document,
        context_tokens=mean,
        template_tokens=template_tokens,
    )
    missing = "" if context_tokens is not None else f" (there is no task folder {folder})"
    return (
        prompts,
        f"prompts{missing}: contexts have a mean of {mean:,} tokens (--plan.context_tokens), "
        f"and {template_tokens:,} more from the template",
    )


def _build(config: Namespace, *args: Any) -> Any:
    """Build the object of a parsed ``class_path``, with the objects that its ``init_args`` name."""
    return _instantiate(config.as_dict(), args)


def _instantiate(spec: Any, args: tuple[Any, ...] = ()) -> Any:
    if not isinstance(spec, dict) or "class_path" not in spec:
        return spec
    init_args = {name: _instantiate(value) for name, value in (spec.get("init_args") or {}).items()}
    return instantiate_class(args, {"class_path": spec["class_path"], "init_args": init_args})
