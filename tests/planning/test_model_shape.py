from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rpt_lightning.planning.model_shape import load_model_config, model_shape
from rpt_lightning.policy.model import Policy

QWEN2_14B = Path(__file__).resolve().parents[2] / "scripts" / "qwen2-14b.json"
SIZES = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def by_hand(family: str, *, is_tied: bool) -> tuple[int, int]:
    """Return the parameters of the model and of one layer for SIZES.

    Queries are 32 wide, and keys and values are 16 wide.
    """
    q, k, v, o = 16 * 32, 16 * 16, 16 * 16, 32 * 16
    layer = q + k + v + o + 3 * 16 * 40 + 2 * 16
    layer += {"llama": 0, "qwen2": 32 + 16 + 16, "qwen3": 2 * 8}[
        family
    ]  # biases of q, k, v / norms of a query and a key head
    return 3 * layer + (1 if is_tied else 2) * 100 * 16 + 16, layer


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_counts_are_those_by_hand_and_of_the_real_model(config_class, is_tied):
    config = config_class(**SIZES, tie_word_embeddings=is_tied)
    shape = model_shape(config)
    real = AutoModelForCausalLM.from_config(config)
    assert shape.num_params == sum(parameter.numel() for parameter in real.parameters())
    assert (shape.num_params, shape.layer_params) == by_hand(config.model_type, is_tied=is_tied)
    assert shape.is_tied == is_tied
    assert (shape.attention_width, shape.kv_width, shape.head_dim) == (32, 16, 8)
    assert shape.has_qk_norm == (config_class is Qwen3Config)
    assert shape.body_params == shape.num_params - (1 if is_tied else 2) * 100 * 16
    assert shape.outer_params == shape.num_params - 3 * shape.layer_params
    assert shape.kv_cache_bytes(2) == 2 * 3 * 16 * 2  # key and value, 3 layers, 16 wide, bf16


def test_qwen2_14b_is_as_large_as_its_model_card_says():
    """The model has 14.7B parameters, of which 13.1B are not in embeddings."""
    shape = model_shape(load_model_config(str(QWEN2_14B)))
    layer = 2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 13824 + 2 * 5120 + (5120 + 2 * 1024)
    assert shape.layer_params == layer
    assert shape.num_params == 48 * layer + 2 * 152064 * 5120 + 5120 == 14_770_033_664
    assert shape.body_params == 48 * layer + 5120 == 13_212_898_304
    assert shape.head_params == 152064 * 5120
    assert shape.kv_cache_bytes(2) == 2 * 48 * 1024 * 2


def test_a_family_that_is_not_worked_out():
    with pytest.raises(ValueError, match="'mistral'"):
        model_shape(MistralConfig())


def test_folder_and_file_are_the_same(tiny_model_dir):
    assert model_shape(load_model_config(str(tiny_model_dir))) == model_shape(
        load_model_config(str(tiny_model_dir / "config.json"))
    )


@pytest.mark.parametrize(
    "path", ["./no/such/folder", "no/such/folder", "no-such.json", "nobody/no-such-model"]
)
def test_a_configuration_that_cannot_be_had(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"{path}.*--plan.model_config"):
        load_model_config(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        (
            {"num_key_value_heads": 3},
            r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)",
        ),
        ({"num_key_value_heads": 8}, r"\(4\) is not a multiple of num_key_value_heads \(8\)"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0 in its config.json|division|modulo"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0 in its config.json"),
        ({"vocab_size": 0}, "vocab_size is 0 in its config.json"),
        ({"head_dim": 15}, "even rotary dimension"),
        ({"head_dim": 0}, "head_dim is 0 in its config.json"),
    ],
)
def test_sizes_that_do_not_fit_each_other(changed, message, tiny_model_dir, tmp_path):
    """For a plan and for a policy: one error that names the file."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 16}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | sizes | changed))
    with pytest.raises(ValueError, match=message):
        load_model_config(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=message):
        Policy(str(tmp_path / "model"))
