"""What is added to the workers of a vLLM server (``--worker-extension-cls``) so that a trainer can hand over weights and look at them.

It runs inside the server, in every worker process, and is called by name through POST /collective_rpc. Nothing but JSON and safetensors crosses the
network. The names begin with ``rpt_`` because they become methods of vLLM's own worker class.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rpt_lightning.rollout.checksum import checksum
from rpt_lightning.rollout.file_names import as_in_files
from rpt_lightning.rollout.server_facts import PROTOCOL, architecture
from rpt_lightning.rollout.vllm_weights import expect_experts, read_weights

_START = secrets.token_hex(8)  # another one with every start of the process


class PolicyWeights:
    """A mixin for vLLM's worker, which has ``vllm_config``, ``get_model`` and ``reload_weights``."""

    vllm_config: Any
    rank: int
    _rpt_loader: tuple[str, float] | None = (
        None  # label of the weights that someone is loading, and until when nobody else may (time.monotonic)
    )

    def rpt_describe(self) -> dict[str, Any]:
        """What a trainer has to know before it trusts this server."""
        from vllm import __version__

        model, cache = self.vllm_config.model_config, self.vllm_config.cache_config
        return {
            "protocol": PROTOCOL,
            "vllm": __version__,
            "start": _START,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "prefix_block_size": cache.block_size if cache.enable_prefix_caching else 0,
            "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
            "architecture": architecture(model.hf_config),
        }

    def rpt_may_load(self, label: str, for_s: float) -> dict[str, bool]:
        """Whether the caller is the one of several ranks that loads the weights of this label; for so many seconds, or until ``rpt_loaded``."""
        now = time.monotonic()
        if self._rpt_loader is not None and self._rpt_loader[0] == label and now < self._rpt_loader[1]:
            return {"may_load": False}  # in a dictionary: /collective_rpc makes a text of everything else
        self._rpt_loader = (label, now + for_s)
        return {"may_load": True}

    def rpt_loaded(self) -> None:
        """Whoever may load has done so, or has failed."""
        self._rpt_loader = None

    def rpt_load_folder(self, folder: str) -> dict[str, Any]:
        """Loads every tensor of a folder's safetensors files in place.

        vLLM's own ``reload_weights(weights_path=...)`` refuses a server that was started with dummy weights, and would read pickles too.
        """
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{folder} holds no .safetensors file; is it on a disk that the server sees under the same path?"
            )
        expect_experts(self.get_model())  # type: ignore[attr-defined]
        weights = as_in_files(_tensors(files), self.vllm_config.model_config.hf_config)
        self.reload_weights(weights_iterator=weights)  # type: ignore[attr-defined]
        return {"num_files": len(files)}

    def rpt_checksums(self, names: list[str]) -> dict[str, str]:
        """``checksum`` of weights in the engine's dtype, under their Hugging Face names; one after the other, to hold one at a time."""
        return {name: checksum(self._rpt_weight(name)) for name in names}

    def rpt_read(self, names: list[str]) -> dict[str, str]:
        """The weights themselves: one safetensors file, as base64."""
        weights = {name: self._rpt_weight(name) for name in names}
        return {"safetensors": base64.b64encode(save(weights)).decode()} if self.rank == 0 else {}

    def _rpt_weight(self, name: str) -> Tensor:
        return read_weights(self.get_model(), [name], self.vllm_config.model_config.dtype)[name]  # type: ignore[attr-defined]


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no iterator)
                yield name, tensors.get_tensor(name)
