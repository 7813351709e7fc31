"""An engine's own transformers model, filled from a stream of weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from rpt_lightning.rollout.weight_part import split_part, take


def build_model(model_path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The architecture of a Hugging Face folder with random weights, in evaluation mode and without the folder's generation defaults."""
    with torch.random.fork_rng(
        devices=[]
    ):  # the random weights are overwritten; the trainer's generator must not notice them
        model: Any = cast(Any, AutoModelForCausalLM).from_config(
            AutoConfig.from_pretrained(model_path), dtype=dtype
        )
    # generate() fills what a request leaves open from here, such as a repetition penalty that the request never asked for.
    model.generation_config = cast(Any, GenerationConfig)()
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def load_weights(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copies in place, rounding to the model's dtype. Names and shapes are checked by the caller."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in weights:
        parameters[name].copy_(tensor)


def read_weights(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies on the CPU of weights or parts of them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parts = {name: split_part(name) for name in names}
    return {
        name: take(parameters[whole].detach(), columns).to("cpu", copy=True)
        for name, (whole, columns) in parts.items()
    }
