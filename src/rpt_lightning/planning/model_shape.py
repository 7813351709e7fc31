"""Sizes of a model that determine its cost, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from rpt_lightning.compat.peft import adapted_layers
from rpt_lightning.compat.transformers import attention_facts, decoder_layers
from rpt_lightning.policy.adapter import Adapter, adapter_parameters, add_adapter, bf16_names
from rpt_lightning.policy.flops import ModelSize, model_size
from rpt_lightning.pretrained.text_shape import check_sizes

# The size of activations is worked out (and tested) for these families. The policy trains no others.
FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model.

    Parameters are counted on the real model. A tied head is counted once, with the embedding.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    attention_width: int  # query heads x head dimension
    kv_width: int  # key-value heads x head dimension
    has_qk_norm: bool
    is_tied: bool
    num_params: int
    layer_params: int  # of one decoder layer
    size: ModelSize  # used to count the model's operations
    # Of an adapter that is trained instead, if there is one:
    adapter_rank: int = 0
    adapter_targets: int = 0  # matrices of a decoder layer that have it
    adapter_params: int = 0  # A and B of all layers; ``num_params`` leaves them out
    bf16_params: int = 0  # frozen weights that are held in bf16

    @property
    def has_adapter(self) -> bool:
        return self.adapter_params > 0

    @property
    def trained_params(self) -> int:
        """Parameters that the optimizer changes: all, or those of the adapter."""
        return self.adapter_params or self.num_params

    @property
    def held_bytes(self) -> int:
        """Size of all weights as the policy holds them: fp32, except frozen ones in bf16."""
        return 4 * (self.num_params - self.bf16_params + self.adapter_params) + 2 * self.bf16_params

    @property
    def head_params(self) -> int:
        """Parameters in the product of the output head, tied or not."""
        return self.size.head_params

    @property
    def outer_params(self) -> int:
        """Parameters outside the decoder layers: embedding, head and last norm."""
        return self.num_params - self.num_layers * self.layer_params

    @property
    def body_params(self) -> int:
        """Parameters that multiply every token: all except embedding and head."""
        return self.size.body_params

    @property
    def head_dim(self) -> int:
        return self.attention_width // self.num_heads

    def kv_cache_bytes(self, dtype_bytes: int) -> int:
        """Return the cache size of one token."""
        return 2 * self.num_layers * self.kv_width * dtype_bytes


def model_shape(config: PretrainedConfig, adapter: Adapter | None = None) -> ModelShape:
    """Build the model without memory for its weights (on the meta device) and count.

    Raises:
        ValueError: The model has no layers for the adapter. The costs of the model's family, or of its
            sliding windows, are not worked out.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"the model's type is {config.model_type!r}; rpt plan knows {', '.join(FAMILIES)}. "
            "Give --plan.model_config of one of these"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"the model ({config.model_type}) has sliding windows, but rpt plan only works out full "
            "attention. Give --plan.model_config of a model without them"
        )
    with torch.device("meta"):
        model: Any = cast(Any, AutoModelForCausalLM).from_config(config)
    model.tie_weights()
    layers = decoder_layers(model)
    head_dim, has_qk_norm = attention_facts(layers[0])
    num_params = sum(parameter.numel() for parameter in model.parameters())
    layer_params = sum(parameter.numel() for parameter in layers[0].parameters())
    of_adapter: dict[str, int] = {}
    if adapter is not None:
        add_adapter(model, adapter, where="rpt plan")
        of_adapter = {
            "adapter_rank": adapter.rank,
            "adapter_targets": len(adapted_layers(layers[0])),
            "adapter_params": sum(parameter.numel() for _, parameter in adapter_parameters(model)),
        }
        if adapter.base_dtype == "bfloat16":
            of_adapter["bf16_params"] = sum(model.get_parameter(name).numel() for name in bf16_names(model))
    return ModelShape(
        family=config.model_type,
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_heads=config.num_attention_heads,
        attention_width=config.num_attention_heads * head_dim,
        kv_width=config.num_key_value_heads * head_dim,
        has_qk_norm=has_qk_norm,
        is_tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        num_params=num_params,
        layer_params=layer_params,
        size=model_size(model),
        **of_adapter,
    )


def load_model_config(path: str) -> PretrainedConfig:
    """Load the configuration of a model folder, a ``config.json`` or a hub id, without its weights.

    Raises:
        ValueError: It cannot be loaded. The message names a way without a network.
    """
    way_out = "give a folder with a config.json, or such a file, with --plan.model_config"
    # A hub id is one name, or two with a slash between them. Anything else can only be a path.
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(".json"):
        folder = Path(path).expanduser()
        if not folder.is_file() and not (folder / "config.json").is_file():
            raise ValueError(f"there is no model configuration at {path} (no config.json); {way_out}")
        path = str(folder)
    try:
        config = cast(PretrainedConfig, AutoConfig.from_pretrained(path))
    except (OSError, ValueError, KeyError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the model configuration of {path} cannot be loaded ({reason}); without a network {way_out}"
        ) from error
    check_sizes(config, where=f"the model configuration of {path}")
    return config
