"""Version 4's names, as its configuration classes read them.

We compared them by hand with version 4.57.6, whose logits are then the same.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, PhiConfig, Qwen2Config

from rpt_lightning.pretrained.older_transformers import older_tokenizer_config, with_older_rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
SLIDING, FULL = (
    {"rope_type": "default", "rope_theta": 12345.0},
    {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
)
CASES = {
    "default": (
        Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        {"rope_theta": 1e6},
    ),
    "llama3": (
        LlamaConfig(rope_parameters=LLAMA3 | {"rope_theta": 5e5}),
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    ),
    "phi": (
        PhiConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}),
        {"rope_theta": 1e4, "partial_rotary_factor": 0.4},
    ),
    "gpt_neox": (
        GPTNeoXConfig(
            rope_parameters={"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}
        ),
        {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
    ),
    "gemma3": (
        Gemma3TextConfig(rope_parameters={"sliding_attention": dict(SLIDING), "full_attention": dict(FULL)}),
        {
            "rope_theta": 2e6,
            "rope_local_base_freq": 12345.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}


@pytest.mark.parametrize(("config", "older"), CASES.values(), ids=CASES)
def test_rotary_frequencies_have_their_older_names_too(config, older, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    before = json.loads(path.read_text())
    after = with_older_rope(before)
    assert {name: value for name, value in after.items() if before.get(name) != value} == older
    path.write_text(json.dumps(after))
    # This version still reads what it wrote.
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_nested_configurations_get_them_as_well() -> None:
    nested = {
        "model_type": "mistral3",
        "text_config": {
            "model_type": "mistral",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        },
    }
    assert with_older_rope(nested)["text_config"]["rope_theta"] == 1e9


def test_tokenizer_config() -> None:
    assert older_tokenizer_config(
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"}, is_repaired=False
    ) == {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "</s>",
    }
    newer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>", "<y>"]}
    assert older_tokenizer_config(newer, is_repaired=False) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<x>", "<y>"],
    }
    assert (
        older_tokenizer_config({"tokenizer_class": "LlamaTokenizerFast"}, is_repaired=True)["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
