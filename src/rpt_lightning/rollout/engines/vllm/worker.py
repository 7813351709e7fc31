"""Extend a vLLM server's workers (``--worker-extension-cls``), so that a trainer can load and read weights.

The code runs inside the server, in every worker process, and is called by name through POST /collective_rpc.
Only JSON and safetensors cross the network. The names begin with ``rpt_`` because they become methods of
vLLM's own worker class.
"""

from __future__ import annotations

import base64
import secrets
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from rpt_lightning.compat.vllm.engine import load_in_worker, worker_facts, worker_model
from rpt_lightning.compat.vllm.layers import expect_experts, keep_lookups_plain
from rpt_lightning.rollout.engines.vllm.weights import read_weights
from rpt_lightning.rollout.servers.agreement import PROTOCOL, architecture
from rpt_lightning.rollout.weight_sync.checksum import checksum
from rpt_lightning.rollout.weight_sync.file_names import as_in_files, make_skeleton
from rpt_lightning.rollout.weight_sync.published_folder import MANIFEST, DamagedWeights, HeldWeights

_START = secrets.token_hex(8)  # differs for every start of the process


class PolicyWeights:
    """A mixin for vLLM's worker, which has ``vllm_config``, ``get_model`` and ``reload_weights``."""

    rank: int
    # Label of the weights that someone is loading, and the time (time.monotonic) until which nobody else may.
    _rpt_loader: tuple[str, float] | None = None
    _rpt_skeleton: Any = None  # transformers' model without weights, from the first load on

    @cached_property
    def _rpt_held(self) -> HeldWeights:
        return HeldWeights()

    def rpt_describe(self) -> dict[str, Any]:
        """Return what a trainer must know before it trusts this server."""
        from vllm import __version__

        _, config, _ = worker_model(self)
        return {
            "protocol": PROTOCOL,
            "vllm": __version__,
            "start": _START,
            **worker_facts(self),
            "architecture": architecture(config),
        }

    def rpt_may_load(self, label: str, for_s: float) -> dict[str, bool]:
        """Return whether the caller is the one of several ranks that loads the weights with this label.

        The permission lasts ``for_s`` seconds, or until ``rpt_loaded``.
        """
        now = time.monotonic()
        if self._rpt_loader is not None and self._rpt_loader[0] == label and now < self._rpt_loader[1]:
            return {"may_load": False}  # a dictionary, because /collective_rpc turns other types into text
        self._rpt_loader = (label, now + for_s)
        return {"may_load": True}

    def rpt_loaded(self) -> None:
        """End the permission to load, after success or failure."""
        self._rpt_loader = None

    def rpt_load_folder(self, folder: str) -> dict[str, Any]:
        """Load the weights that are published in a folder (docs/weight-sync.md) in place.

        All weights are loaded, even if only some changed: vLLM's layers join several tensors, and load
        either all of them or garbage. vLLM's own ``reload_weights(weights_path=...)`` refuses a server that
        was started with dummy weights. It would also read pickles.

        Returns:
            What is wrong with the published weights, as ``damage``, or None. The model is then unchanged.
        """
        try:
            weights = self._rpt_held.load(Path(folder))
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} holds no {MANIFEST}; is it on a disk that the server sees under the same path?"
            ) from error
        except DamagedWeights as error:
            return {"damage": str(error)}
        model, config, _ = worker_model(self)
        expect_experts(model)
        keep_lookups_plain(model)
        if self._rpt_skeleton is None:
            self._rpt_skeleton = make_skeleton(config)
        load_in_worker(self, as_in_files(weights, self._rpt_skeleton))
        return {"damage": None}

    def rpt_checksums(self, names: list[str]) -> dict[str, str]:
        """Return ``checksum`` of weights in the engine's dtype, under their Hugging Face names.

        The weights are read one after the other, so only one is held at a time.
        """
        return {name: checksum(self._rpt_weight(name)) for name in names}

    def rpt_read(self, names: list[str]) -> dict[str, str]:
        """Return the weights themselves as one safetensors file in base64."""
        weights = {name: self._rpt_weight(name) for name in names}
        return {"safetensors": base64.b64encode(save(weights)).decode()} if self.rank == 0 else {}

    def _rpt_weight(self, name: str) -> Tensor:
        model, _, dtype = worker_model(self)
        return read_weights(model, [name], dtype)[name]
