"""peft: the layers of a low-rank adapter, and the files that hold one. Tested with peft 0.21.2.

The functions import peft themselves, because its import takes seconds and few runs need it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

_NAME = "default"  # peft's name for the only adapter of a model
_FILE_PREFIX = "base_model.model."  # begins each tensor's name in peft's files
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE = ".base_layer."  # stands in the name of a weight whose layer has an adapter


def inject(
    model: PreTrainedModel, *, rank: int, alpha: float, targets: Collection[str], rslora: bool
) -> None:
    """Give the linear layers with these last names an adapter without values, and freeze all else.

    The new weights are on the meta device, so peft draws no random numbers.

    Relies on ``inject_adapter_in_model``, which peft documents, and on two attributes of its layers:
    ``cast_input_dtype_enabled``, without which a bf16 input would be copied as fp32 and cast back, and
    ``peft_config`` of the model.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(
        lora_config(rank=rank, alpha=alpha, targets=targets, rslora=rslora),
        model,
        adapter_name=_NAME,
        low_cpu_mem_usage=True,
    )
    for layer in adapted_layers(model).values():
        layer.cast_input_dtype_enabled = False


def lora_config(
    *, rank: int, alpha: float, targets: Collection[str], rslora: bool, base: str | None = None
) -> Any:
    """Return peft's configuration of an adapter without dropout and without biases.

    Relies on ``LoraConfig``, which takes a number for ``lora_alpha`` whether it is whole or not.
    """
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=cast(Any, int(alpha) if alpha == int(alpha) else alpha),
        target_modules=sorted(targets),
        lora_dropout=0.0,
        bias="none",
        use_rslora=rslora,
    )


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return peft's layers by the names of the layers that they replaced.

    Relies on ``peft.tuners.lora.Linear``.
    """
    from peft.tuners.lora import Linear

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def parts(layer: Any) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, float]:
    """Return a layer's own weight W [out, in], its A [r, in], its B [out, r], and the factor s of B A.

    The layer computes ``x W^T + s (x A^T) B^T``. Relies on ``base_layer``, ``lora_A``, ``lora_B`` and
    ``scaling``.
    """
    return (
        layer.base_layer.weight,
        layer.lora_A[_NAME].weight,
        layer.lora_B[_NAME].weight,
        float(layer.scaling[_NAME]),
    )


def part_names(layer_name: str) -> tuple[str, str]:
    """Return the names of a layer's A and B among the model's parameters.

    >>> part_names("model.layers.0.mlp.up_proj")[0]
    'model.layers.0.mlp.up_proj.lora_A.default.weight'
    """
    return f"{layer_name}.lora_A.{_NAME}.weight", f"{layer_name}.lora_B.{_NAME}.weight"


def split_part_name(name: str) -> tuple[str, str]:
    """Split the name of an A or B into the layer's name and "lora_A" or "lora_B".

    >>> split_part_name("model.layers.0.mlp.up_proj.lora_B.default.weight")
    ('model.layers.0.mlp.up_proj', 'lora_B')
    """
    layer, kind = name.removesuffix(f".{_NAME}.weight").rsplit(".", 1)
    return layer, kind


def name_in_file(name: str) -> str:
    """Return the name that peft's files use for one of the model's parameters.

    >>> name_in_file("model.layers.0.mlp.up_proj.lora_A.default.weight")
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return _FILE_PREFIX + name.replace(f".{_NAME}.", ".")


def name_in_model(name: str) -> str | None:
    """Return the parameter's name for a name in peft's files, or None if it is neither an A nor a B.

    >>> name_in_model("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    'model.layers.0.mlp.up_proj.lora_B.default.weight'
    """
    for kind in ("lora_A", "lora_B"):
        end = f".{kind}.weight"
        if name.startswith(_FILE_PREFIX) and name.endswith(end):
            return f"{name.removeprefix(_FILE_PREFIX).removesuffix(end)}.{kind}.{_NAME}.weight"
    return None


def save_config(config: Any, folder: Path) -> None:
    """Write ``adapter_config.json``. Relies on ``save_pretrained`` of the configuration."""
    config.inference_mode = True
    config.save_pretrained(str(folder))
