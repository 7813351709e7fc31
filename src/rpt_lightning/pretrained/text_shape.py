"""Read from a model's config how it handles text.

Only this module knows under which names the model families keep it.
"""

from __future__ import annotations

from typing import Any

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
# Names of the longest context. A config has one of them (transformers maps the first to most families' own
# name by attribute_map).
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
# With these types the config's positions already include scaling. Other types multiply them (the rule of
# `_get_and_verify_max_len` in vLLM 0.32 and 0.33).
ALREADY_SCALED = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


def longest_context(config: Any) -> int | None:
    """Return the most tokens that a model can read, including RoPE scaling.

    Returns None for families without a limit (Mamba, RecurrentGemma, BLOOM's ALiBi). ``config`` is that of a
    text model, or of a model with several parts of which one is text (Gemma 3, Mistral 3, Qwen3.5).
    """
    text = config.get_text_config()
    positions = next(
        (value for name in POSITIONS if isinstance(value := getattr(text, name, None), int)), None
    )
    if positions is None or "gemma3" in text.model_type:  # Gemma 3's number already includes scaling
        return positions
    return int(
        positions
        * _rope_factor(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {})
    )


def _rope_factor(rope: dict[str, Any]) -> float:
    """Return the factor of RoPE parameters, given as one set or as one per kind of layer.

    All sets of a model have the same factor.
    """
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    factors = [
        kind["factor"]
        for kind in kinds
        if kind.get("rope_type", kind.get("type", "default")) not in ALREADY_SCALED and kind.get("factor")
    ]
    return float(factors[-1]) if factors else 1.0


def check_not_quantized(config: Any, *, where: str) -> None:
    """Raise ValueError if the weights are quantized.

    They would be trained as something other than what the config says, or not at all.
    """
    quantization = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if quantization:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise ValueError(
            f"{where}: its config.json says that its weights are quantized "
            f"({settings.get('quant_method', 'quantization_config')}), and a policy is trained "
            "in full precision; give the model's unquantized weights"
        )


def check_sizes(config: Any, *, where: str) -> None:
    """Check that the sizes in a ``config.json`` fit each other, before a library fails somewhere inside.

    Raises:
        ValueError: if they do not.
    """
    text = config.get_text_config()
    sizes = {name: getattr(text, name, None) for name in SIZES}
    for name, value in sizes.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{where}: {name} is {value} in its config.json; it must be at least 1")
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise ValueError(
            f"{where}: in its config.json num_attention_heads ({heads}) is not a multiple of "
            f"num_key_value_heads ({kv_heads})"
        )
