"""What trainer and server must agree on, asked by the one and answered by the other."""

from __future__ import annotations

from typing import Any


def architecture(config: Any) -> dict[str, Any]:
    """What two model configurations must share for one model to take the other's weights."""
    return {name: getattr(config, name, None) for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")}
