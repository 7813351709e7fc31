"""Weights as a model family publishes them in its files, which is the form that vLLM's loaders expect.

While transformers loads a folder, it joins the experts of a mixture into one tensor and renames some layers.
``save_pretrained`` reverses this, and so does this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rpt_lightning.compat import transformers as compat


def as_in_files(
    weights: Iterable[tuple[str, Tensor]], skeleton: PreTrainedModel
) -> Iterator[tuple[str, Tensor]]:
    """Turn a model's parameters into the tensors of its files.

    Args:
        weights: Names and tensors of transformers' model.
        skeleton: That model without weights (``make_skeleton``).
    """
    if not compat.converts_weights(skeleton):
        yield from weights
        return
    for name, tensor in weights:
        yield from compat.as_in_files(skeleton, {name: tensor}).items()


def names_in_files(skeleton: PreTrainedModel) -> dict[str, list[str]]:
    """Map each parameter of transformers' model to the tensors in the family's files that it is made of."""
    parameters = skeleton.named_parameters(remove_duplicate=False)
    return {name: list(compat.as_in_files(skeleton, {name: tensor})) for name, tensor in parameters}


def make_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build transformers' model on the meta device. Keep it: a large model takes a second."""
    with torch.device("meta"):
        return cast(PreTrainedModel, cast(Any, AutoModelForCausalLM).from_config(config))
