"""Files of an exported folder in words that older versions of transformers read alike (4.57, which evaluation tools and servers pin).

transformers 5 has names of its own for rotary frequencies and for tokenizer classes. Version 4 passes over the former without a word, and so computes with
its defaults, and cannot load the latter.
"""

from __future__ import annotations

from typing import Any

GENERIC_CLASS = "PreTrainedTokenizerFast"  # version 5 calls it TokenizersBackend and knows this name too


def with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json with version 4's names beside `rope_parameters`, in nested configurations as well."""
    out = {
        name: with_older_rope(value) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in config.items()
    }
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return out
    if "rope_theta" in rope:
        return out | _older(rope, config.get("model_type"))
    # Gemma 3: one for each kind of layer, of which version 4 scales that of full attention.
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if full and "rope_theta" in full:
        out |= _older(full, config.get("model_type"))
    if sliding and "rope_theta" in sliding:
        out["rope_local_base_freq"] = sliding["rope_theta"]
    return out


def _older(rope: dict[str, Any], model_type: str | None) -> dict[str, Any]:
    is_neox = model_type in ("gpt_neox", "gpt_neox_japanese")
    theta, share = ("rotary_emb_base", "rotary_pct") if is_neox else ("rope_theta", "partial_rotary_factor")
    older = {theta: rope["rope_theta"]}
    if rope.get("partial_rotary_factor") is not None:
        older[share] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {
            name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")
        }
    return older


def older_tokenizer_config(config: dict[str, Any], *, is_repaired: bool) -> dict[str, Any]:
    """The content of a tokenizer_config.json without what only version 5 knows.

    A tokenizer that had to be repaired gets the class that takes tokenizer.json as it is, in every version.
    """
    out = dict(config)
    if is_repaired or out.get("tokenizer_class") in ("TokenizersBackend", None):
        out["tokenizer_class"] = GENERIC_CLASS
    extra = out.get("extra_special_tokens")
    if isinstance(
        extra, list
    ):  # version 4 wants names for them here, and has another field for those without
        del out["extra_special_tokens"]
        named = out.get("additional_special_tokens") or []
        out["additional_special_tokens"] = [*named, *(token for token in extra if token not in named)]
    return out
