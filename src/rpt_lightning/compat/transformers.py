"""transformers: its models, configurations and files. Tested with transformers 5.19.0.

The functions import the less usual modules of transformers themselves, because most commands do not need
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

# Entries of a configuration that say how it was read and nothing about the model.
READING_ENTRIES = (
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "_attn_implementation",
    "architectures",
)
# What a layer passes to its attention function if the function must change the scores: a cap on them (Gemma
# 2), or attention sinks (gpt-oss).
SCORE_CHANGES = ("softcap", "s_aux")

# Models


def attention_name(model: PreTrainedModel) -> str:
    """Return the name of the attention function that the layers call. ``set_attn_implementation`` takes it.

    Relies on the configuration's ``_attn_implementation``.
    """
    config: Any = model.config
    return str(config._attn_implementation)


def supports_sdpa(model: PreTrainedModel) -> bool:
    """Whether the family's layers can call ``scaled_dot_product_attention``.

    Relies on the class attribute ``_supports_sdpa``.
    """
    return bool(getattr(model, "_supports_sdpa", False))


def decoder_layers(model: PreTrainedModel) -> Any:
    """Return the list of decoder layers.

    Relies on the name ``layers`` in the base model, which all families have that we shard or compile.
    """
    base: Any = model.base_model
    return base.layers


def attention_facts(layer: nn.Module) -> tuple[int, bool]:
    """Return the width of a decoder layer's heads, and whether it normalises queries and keys.

    Relies on the names ``self_attn``, ``head_dim`` and ``q_norm`` in Llama, Qwen2 and Qwen3.
    """
    attention: Any = layer.self_attn
    return int(attention.head_dim), hasattr(attention, "q_norm")


def layer_plan(config: Any) -> dict[str, str]:
    """Return the family's plan for tensor parallelism: the style of each matrix in its layers.

    Relies on ``base_model_tp_plan`` and on its names, such as ``layers.*.self_attn.q_proj``. The result is
    empty if the family has no plan.
    """
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    return {name: style for name, style in plan.items() if name.startswith("layers.")}


def rope_depends_on_call(rope_type: str) -> bool:
    """Whether rotary frequencies of this type depend on the longest position of a call.

    Relies on the names that ``dynamic_rope_update`` looks for.
    """
    return rope_type == "longrope" or "dynamic" in rope_type


# Weights in files


def ignored_names(model: PreTrainedModel) -> set[str]:
    """Return patterns of the names that a family allows in its files beside its own weights.

    Relies on ``_keys_to_ignore_on_load_unexpected``, and on the two patterns that transformers adds for every
    family when it loads a model: buffers that older versions saved.
    """
    return {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    }


def converts_weights(model: PreTrainedModel) -> bool:
    """Whether the family's files hold other tensors or names than the model.

    Relies on ``get_model_conversion_mapping``. Without ``add_legacy`` it leaves out what only old files need.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def type_converts_weights(model_type: str) -> bool:
    """Whether transformers converts the weights of a model type when it loads them.

    Relies on ``get_checkpoint_conversion_mapping``.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return bool(get_checkpoint_conversion_mapping(model_type))  # type: ignore[no-untyped-call]


def as_in_files(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn parameters of a model into the tensors that the family's files hold of them.

    Relies on ``revert_weight_conversion``, which ``save_pretrained`` calls with all parameters. It also takes
    some of them, and tensors on the meta device.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, weights)


# Files


def cached_path(repository: str, name: str) -> Path | None:
    """Find a file of a hub id in the cache or on the hub. Return None if there is none.

    Relies on three private parameters of ``cached_file``, which make it return None where it would raise an
    error. It raises OSError if ``repository`` is not a hub id.
    """
    found = cached_file(
        repository,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
