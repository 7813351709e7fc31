"""The adapter that a vLLM engine multiplies beside its weights: loading it and reading it back."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpt_lightning.compat.peft import split_part_name
from rpt_lightning.compat.vllm.layers import read_adapter_tensor
from rpt_lightning.compat.vllm.lora import adapter_request, add_adapter
from rpt_lightning.pretrained.adapter_folder import write_adapter_folder


class HeldAdapter:
    """The engine's adapter. vLLM reads it from a folder, in memory where the system has one there.

    Args:
        llm: vLLM's ``LLM``, started with adapters.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        shared_memory = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(
            prefix="rpt-adapter-", dir=shared_memory if shared_memory.is_dir() else None
        )
        self._rank = 0
        self.request: Any = None  # what completions are asked with

    def load(self, adapter: Mapping[str, Tensor], *, version: int) -> None:
        """Replace the adapter. ``adapter`` holds A and s B, so vLLM's own factor is alpha / r = 1."""
        layers = {split_part_name(name)[0] for name in adapter}
        self._rank = next(tensor.shape[0] for name, tensor in adapter.items() if ".lora_A." in name)
        folder = Path(self._folder.name)
        write_adapter_folder(
            folder,
            {name: tensor.to("cpu") for name, tensor in adapter.items()},
            rank=self._rank,
            alpha=float(self._rank),
            targets=tuple(sorted({name.rpartition(".")[2] for name in layers})),
            rslora=False,
            base="the engine's weights",
        )
        add_adapter(self._llm, adapter_request(folder, version=version, replaces=True))
        self.request = adapter_request(folder, version=version, replaces=False)

    def read(self, model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Copy A and s B to the CPU as vLLM computes with them."""
        return {
            name: read_adapter_tensor(model, *split_part_name(name), self._rank).to("cpu", dtype, copy=True)
            for name in names
        }

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()
