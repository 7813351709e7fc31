"""An engine's own transformers model, filled from a stream of weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from rpt_lightning.rollout.weight_sync.weight_part import split_part, take


def build_model(model_path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Build the architecture of a Hugging Face folder with random weights, in evaluation mode.

    The folder's generation defaults are left out.
    """
    # The random weights are overwritten later. Drawing them must not affect the trainer's generator.
    with torch.random.fork_rng(devices=[]):
        model: Any = cast(Any, AutoModelForCausalLM).from_config(
            AutoConfig.from_pretrained(model_path), dtype=dtype
        )
    # generate() takes whatever a request leaves open from here, such as a repetition penalty that was never
    # requested.
    model.generation_config = cast(Any, GenerationConfig)()
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def load_weights(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy in place, rounding to the model's dtype. The caller checks names and shapes."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in weights:
        parameters[name].copy_(tensor)


def read_weights(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Tensor]:
    """Copy weights or parts of them to the CPU."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parts = {name: split_part(name) for name in names}
    return {
        name: take(parameters[whole].detach(), columns).to("cpu", copy=True)
        for name, (whole, columns) in parts.items()
    }
