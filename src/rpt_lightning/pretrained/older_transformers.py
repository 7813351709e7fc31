"""Write the files of an exported folder so that older versions of transformers read them alike.

Version 4.57 matters, because evaluation tools and servers pin it. transformers 5 has its own names for rotary
frequencies and for tokenizer classes. Version 4 silently ignores the former, and so computes with its
defaults. It cannot load the latter.
"""

from __future__ import annotations

from typing import Any

GENERIC_CLASS = "PreTrainedTokenizerFast"  # version 5 calls it TokenizersBackend but accepts this name too


def with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Add version 4's names beside `rope_parameters` to the content of a config.json.

    Nested configurations get them as well.
    """
    out = {
        name: with_older_rope(value) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in config.items()
    }
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return out
    if "rope_theta" in rope:
        return out | _older(rope, config.get("model_type"))
    # Gemma 3 has one for each kind of layer. Version 4 scales the one for full attention.
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
    """Remove what only version 5 knows from the content of a tokenizer_config.json.

    A tokenizer that had to be repaired gets the class that uses tokenizer.json unchanged in every version.
    """
    out = dict(config)
    if is_repaired or out.get("tokenizer_class") in ("TokenizersBackend", None):
        out["tokenizer_class"] = GENERIC_CLASS
    extra = out.get("extra_special_tokens")
    # Version 4 expects names for these tokens here, and has another field for tokens without names.
    if isinstance(extra, list):
        del out["extra_special_tokens"]
        named = out.get("additional_special_tokens") or []
        out["additional_special_tokens"] = [*named, *(token for token in extra if token not in named)]
    return out
