"""What trainer and server must agree on. The trainer asks for these facts and the server answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# The version of the methods in rollout/engines/vllm/worker.py that a trainer may call. It changes whenever
# they change.
PROTOCOL = 4


def architecture(config: Any) -> dict[str, Any]:
    """Return what two model configurations must share for one model to take the other's weights."""
    return {
        name: getattr(config, name, None)
        for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")
    }


def check_facts(
    url: str, facts: Mapping[str, Any], *, dtype: torch.dtype, model: Mapping[str, object], max_model_len: int
) -> None:
    """Raise ValueError if the server at ``url`` cannot serve a run whose model has architecture ``model``."""
    if facts.get("protocol") != PROTOCOL:
        raise ValueError(
            f"rollout.engine.urls: {url} uses another version of rpt-lightning than "
            "this run. Install the same version for both"
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
            f"rollout.engine.urls: {url} runs with {'; '.join(wrong)}. Start "
            "it with `rpt serve` and this run's config"
        )
