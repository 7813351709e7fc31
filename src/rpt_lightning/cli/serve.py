"""`rpt serve` starts the vLLM servers that a run's configuration names, on this machine.

It takes the same files as `rpt fit`, and flags under ``--serve``.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoConfig

from rpt_lightning.cli.run import RPTCLI, make_cli
from rpt_lightning.pretrained.adapter_folder import base_of
from rpt_lightning.pretrained.text_shape import longest_context
from rpt_lightning.rollout.servers.access import find_key, make_key
from rpt_lightning.rollout.servers.processes import Servers, ServerSpec, is_loopback, server_command
from rpt_lightning.training.validation.prompt_limits import max_model_len


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """How servers run on this machine. The run's configuration defines the model that they serve.

    Args:
        host: Address that servers bind to. Anyone who can reach it and has the key can change the weights.
            Requests and the key are sent in clear text.
        urls: Those of rollout.engine.urls whose servers start on this machine. null means those with a
            loopback address.
        tensor_parallel_size: Number of GPUs for each server. The servers share the GPUs that
            CUDA_VISIBLE_DEVICES lists, or all GPUs if it is not set.
        gpu_memory_utilization: Fraction of a GPU's memory that a server takes. Not used on CPUs.
        kv_cache_gib: Size of a server's key-value cache on CPUs, in GiB. Not used on GPUs.
        max_num_seqs: Number of completions that a server generates at the same time.
        enforce_eager: Turn off compilation and CUDA graphs. null turns them off only on CPUs.
        block_size: Number of tokens in a cache block. null means 32 on CPUs and vLLM's choice on GPUs.
        restart: Restart a server that died.
        ready_timeout_s: Time limit for the servers to become ready, in seconds.
        hung_s: Seconds without an answer after which a server is stopped. It is then restarted if ``restart``
            is set. The value must be longer than a server takes to load weights.
        log_folder: Folder for the servers' output. null means servers/ in the run folder.
    """

    host: str = "127.0.0.1"
    urls: list[str] | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float = 1.0
    max_num_seqs: int = 256
    enforce_eager: bool | None = None
    block_size: int | None = None
    restart: bool = True
    ready_timeout_s: float = 900.0
    hung_s: float = 900.0
    log_folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "kv_cache_gib", "max_num_seqs", "ready_timeout_s", "hung_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"rpt serve: --serve.{name} {getattr(self, name)} must be positive")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"rpt serve: --serve.gpu_memory_utilization {self.gpu_memory_utilization} must be above 0 "
                "and at most 1"
            )


class ServeCLI(RPTCLI):
    """Reads a run's configuration without building anything from it."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(ServeSettings, "serve")

    def instantiate_classes(self) -> None:
        """Build nothing."""


def serve(args: list[str]) -> None:
    """Start the servers and watch over them until SIGTERM or SIGINT."""
    sys.argv = ["rpt serve", *args]  # LightningCLI warns if both its args and the process's own are given
    description = "Start the vLLM servers that a run's configuration names. Takes the flags of `rpt fit`."
    config = make_cli(ServeCLI, run=False, prog="rpt serve", description=description).config
    settings = ServeSettings(**config.serve)
    if (engine := config.rollout.engine) is None or not engine.class_path.endswith(".VLLMServerEngine"):
        raise ValueError(
            "rpt serve: rollout.engine is not VLLMServerEngine; add --config configs/rollout/servers.yaml"
        )
    specs = server_specs(config, settings)
    key = _key(engine.init_args)
    Servers(specs, key=key, restart=settings.restart, hung_s=settings.hung_s).run(
        ready_timeout_s=settings.ready_timeout_s
    )


def server_specs(config: Any, settings: ServeSettings) -> list[ServerSpec]:
    """The servers to start here. Raises ValueError if this machine cannot serve an address."""
    engine, path = config.rollout.engine.init_args, base_of(config.model.init_args.policy.init_args.path)
    urls = [url.rstrip("/") for url in engine.urls]
    here = (
        [url for url in urls if is_loopback(urlsplit(url).hostname or "")]
        if settings.urls is None
        else [url.rstrip("/") for url in settings.urls]
    )
    if not here or not set(here) <= set(urls):
        raise ValueError(
            f"rpt serve: none of rollout.engine.urls={urls} is to be started here (--serve.urls {here}); "
            "name some of them in --serve.urls, or others in --rollout.engine.urls"
        )
    outside = [url for url in here if not is_loopback(urlsplit(url).hostname or "")]
    if outside and is_loopback(settings.host):
        raise ValueError(
            f"rpt serve: nobody could reach {outside[0]} with --serve.host {settings.host}; "
            "give the address of this machine, or 0.0.0.0"
        )
    folder = Path(settings.log_folder or Path(config.trainer.default_root_dir or ".") / "servers")
    devices = _devices(len(here), settings.tensor_parallel_size)
    on_gpu = devices[0] is not None
    return [
        ServerSpec(
            url=url,
            command=server_command(
                model_path=path,
                url=url,
                host=settings.host,
                dtype=engine.dtype,
                max_model_len=_max_model_len(config, path),
                seed=config.seed_everything or 0,
                tensor_parallel_size=settings.tensor_parallel_size,
                max_num_seqs=settings.max_num_seqs,
                gpu_memory_utilization=settings.gpu_memory_utilization if on_gpu else None,
                kv_cache_gib=None if on_gpu else settings.kv_cache_gib,
                enforce_eager=settings.enforce_eager if settings.enforce_eager is not None else not on_gpu,
                block_size=settings.block_size if settings.block_size is not None or on_gpu else 32,
                weight_transfer="nccl" if engine.transport.class_path.endswith(".NCCLTransport") else None,
            ),
            devices=own_devices,
            log_file=folder / _log_name(url),
        )
        for url, own_devices in zip(here, devices, strict=True)
    ]


def _log_name(url: str) -> str:
    """Log file of a server. Several nodes may share one folder, and servers on them may share a port."""
    place = urlsplit(url)
    host = place.hostname or ""
    # Not `is_loopback`: a machine's own name may well resolve to its loopback address, on each node.
    return (
        f"server-{place.port}.log"
        if host in ("127.0.0.1", "::1", "localhost")
        else f"server-{host.replace(':', '_')}-{place.port}.log"
    )


def _max_model_len(config: Any, path: str) -> int:
    """Same value as the run itself will request."""
    needed = int(config.rollout.max_prompt_tokens + config.rollout.sampling.max_completion_tokens)
    positions = longest_context(AutoConfig.from_pretrained(path))
    return max_model_len(
        needed, positions=positions, with_controls=config.rollout.evaluation.thought_controls
    )


def _devices(num_servers: int, per_server: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each server. None if there is no GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        [gpu for gpu in visible.split(",") if gpu]
        if visible is not None
        else [str(index) for index in range(torch.cuda.device_count())]
    )
    if not torch.cuda.is_available():
        return [None] * num_servers
    if len(gpus) < num_servers * per_server:
        raise ValueError(
            f"rpt serve: {num_servers} servers of {per_server} GPUs each (--serve.tensor_parallel_size) do "
            f"not fit on {len(gpus)} GPUs; start fewer here (--serve.urls)"
        )
    return [
        ",".join(gpus[first : first + per_server]) for first in range(0, num_servers * per_server, per_server)
    ]


def _key(engine: Any) -> str:
    """Find or make the key. Nothing starts without one.

    Anyone who can send requests to a server can change its weights.
    """
    if key := find_key(engine.api_key_env, engine.api_key_file):
        return key
    if engine.api_key_file is None:
        raise ValueError(
            f"rpt serve: there is no key. Set the environment variable {engine.api_key_env} to a long random "
            "text, here and for `rpt fit`, or name a file in rollout.engine.api_key_file, which is then made"
        )
    key = make_key(engine.api_key_file)
    print(f"wrote a new key to {engine.api_key_file}; `rpt fit` reads it from there", flush=True)
    return key
