"""Folders with an adapter in peft's format: the weights of a low-rank adapter, and the name of its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rpt_lightning.compat import peft as compat
from rpt_lightning.pretrained.weights import not_finite, not_finite_message

# In the metadata of the file with the tensors: `weights_hash` of the base. peft and vLLM ignore it.
_BASE_HASH = "base_weights_sha256"
# Entries of adapter_config.json that must have these values. With others a layer computes something else
# than x W^T + s (x A^T) B^T, or s differs between layers.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """What an adapter's folder says.

    ``base`` is the folder or hub id of the model that it belongs to, and ``base_hash`` its hash, if the file
    names it (`rpt export` does, peft does not). ``scale`` is the factor of B A.
    """

    path: Path
    base: str
    base_hash: str | None
    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool

    @property
    def scale(self) -> float:
        """The factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def tensors(self) -> dict[str, Tensor]:
        """Read A and B of all layers in fp32, by the names of the model's parameters.

        Raises:
            ValueError: A tensor is neither an A nor a B, or not finite.
        """
        found = {}
        with safe_open(self.path / compat.WEIGHTS_FILE, framework="pt", device="cpu") as file:
            for name in list(file.keys()):
                own = compat.name_in_model(name)
                if own is None:
                    raise ValueError(
                        f"{self.path}: its tensor {name} is not part of a plain LoRA adapter; merge the "
                        "adapter into its base with peft (merge_and_unload), and use the merged folder"
                    )
                found[own] = file.get_tensor(name).to(torch.float32)
        if bad := not_finite(found.items()):
            raise ValueError(not_finite_message(bad, where=str(self.path)))
        return found


def is_adapter_folder(path: str) -> bool:
    """Whether a path is a folder with an adapter instead of a model."""
    folder = Path(path).expanduser()
    return (folder / compat.CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def base_of(path: str) -> str:
    """Return the folder or hub id of the model's weights: the adapter's base, or the path itself."""
    return read_adapter_folder(path).base if is_adapter_folder(path) else path


def read_adapter_folder(path: str) -> AdapterFolder:
    """Read what an adapter's folder says, without its weights.

    Raises:
        ValueError: The adapter is not a plain LoRA adapter, names no base, or cannot be read.
    """
    folder = Path(path).expanduser()
    try:
        config = json.loads((folder / compat.CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / compat.WEIGHTS_FILE, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        targets = config["target_modules"]
        base = config["base_model_name_or_path"]
    except Exception as error:  # safetensors has a class of its own for a damaged file
        raise ValueError(
            f"{path}: its adapter cannot be read ({type(error).__name__}: {error}); it needs "
            f"{compat.CONFIG_FILE} and {compat.WEIGHTS_FILE}, as `rpt export --form adapter` or peft's "
            "save_pretrained write them"
        ) from error
    unusual = {
        name: config[name] for name, plain in _PLAIN.items() if name in config and config[name] not in plain
    }
    if isinstance(targets, str):
        unusual["target_modules"] = targets
    if unusual:
        raise ValueError(
            f"{path}: {compat.CONFIG_FILE} has {unusual}, which is no plain LoRA adapter; merge it into its "
            "base with peft (merge_and_unload), and use the merged folder"
        )
    if not base:
        raise ValueError(
            f"{path}: {compat.CONFIG_FILE} names no base_model_name_or_path; write the folder or hub id of "
            "the model there"
        )
    return AdapterFolder(
        path=folder,
        base=str(base),
        base_hash=metadata.get(_BASE_HASH),
        rank=rank,
        alpha=alpha,
        targets=tuple(sorted(targets)),
        rslora=bool(config.get("use_rslora")),
    )


def write_adapter_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    targets: tuple[str, ...],
    rslora: bool,
    base: str,
    base_hash: str | None = None,
) -> None:
    """Write an adapter as peft reads it.

    Args:
        folder: An existing folder.
        tensors: A and B of all layers, by the names of the model's parameters.
        rank: Rank of the adapter.
        alpha: Its alpha.
        targets: Last names of the layers that have it.
        rslora: Whether the factor is alpha / sqrt(rank).
        base: Folder or hub id of the base.
        base_hash: `weights_hash` of the base.
    """
    config = compat.lora_config(rank=rank, alpha=alpha, targets=targets, rslora=rslora, base=base)
    compat.save_config(config, folder)
    save_file(
        {compat.name_in_file(name): tensor.contiguous() for name, tensor in tensors.items()},
        folder / compat.WEIGHTS_FILE,
        metadata={"format": "pt", **({_BASE_HASH: base_hash} if base_hash else {})},
    )


def check_base(hash_there: str, hash_wanted: str | None, *, where: str, base: str) -> None:
    """Raise ValueError if the base's weights are not those that the adapter was trained on."""
    if hash_wanted is not None and hash_there != hash_wanted:
        raise ValueError(
            f"{where}: the adapter was trained on weights with the hash {hash_wanted}, and those of "
            f"{base} have {hash_there}: with them it would be another model. Give the base that it was "
            "trained on"
        )
