"""What trainer and server must agree on, asked by the one and answered by the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# What a trainer may ask of the methods in vllm_worker.py; another number with every change of them.
PROTOCOL = 3


def architecture(config: Any) -> dict[str, Any]:
    """What two model configurations must share for one model to take the other's weights."""
    return {
        name: getattr(config, name, None)
        for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")
    }


def check_facts(
    url: str, facts: Mapping[str, Any], *, dtype: torch.dtype, model: Mapping[str, object], max_model_len: int
) -> None:
    """Raises ValueError where the server at ``url`` cannot serve the run, whose model has the architecture ``model``."""
    if facts.get("protocol") != PROTOCOL:
        raise ValueError(
            f"rollout.engine.urls: {url} runs with another version of rpt-lightning than this run. Install one version for both"
        )
    wanted = {
        "dtype": str(dtype).removeprefix("torch."),
        "logprobs_mode": "processed_logprobs",
        "architecture": model,
    }
    wrong = [f"{name} {facts[name]}, not {value}" for name, value in wanted.items() if facts[name] != value]
    if facts["max_model_len"] < max_model_len:
        wrong.append(f"max_model_len {facts['max_model_len']}, less than {max_model_len}")
    if wrong:
        raise ValueError(
            f"rollout.engine.urls: {url} runs with {'; '.join(wrong)}. Start it with `rpt serve` and this run's config"
        )
