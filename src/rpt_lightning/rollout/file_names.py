"""Weights under the names, and cut up in the way, of the files that a model family publishes, which is what vLLM's loaders are written for.

transformers keeps the experts of a mixture as one tensor, and renames some layers, while it loads a folder; ``save_pretrained`` turns it back. So does this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion


def as_in_files(
    weights: Iterable[tuple[str, Tensor]], config: PreTrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    """Turns a model's parameters, by name, into the tensors of its files.

    Args:
        weights: Names and tensors of transformers' model.
        config: Of that model.
    """
    model = _skeleton(config)
    if not get_model_conversion_mapping(model, add_legacy=False):
        yield from weights
        return
    for name, tensor in weights:
        yield from revert_weight_conversion(model, {name: tensor}).items()


def names_in_files(config: PreTrainedConfig) -> dict[str, list[str]]:
    """For each parameter of transformers' model, the tensors of the family's files that it is made of."""
    model = _skeleton(config)
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: list(revert_weight_conversion(model, {name: tensor})) for name, tensor in parameters}


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return cast(PreTrainedModel, cast(Any, AutoModelForCausalLM).from_config(config))
