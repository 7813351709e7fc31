from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from rpt_lightning.pretrained.text_shape import check_not_quantized, longest_context


@pytest.mark.parametrize(
    ("model_type", "settings", "longest"),
    [
        ("llama", {"max_position_embeddings": 640}, 640),
        ("gpt2", {"n_positions": 128}, 128),
        ("mpt", {"max_seq_len": 96}, 96),
        ("opt", {"max_position_embeddings": 70}, 70),
        ("gemma3", {"text_config": {"max_position_embeddings": 512}}, 512),
        ("mistral3", {"text_config": {"model_type": "mistral", "max_position_embeddings": 320}}, 320),
        ("mamba", {}, None),
        ("mamba2", {}, None),
        ("bloom", {}, None),
    ],
)
def test_every_family_keeps_it_elsewhere(
    model_type: str, settings: dict[str, Any], longest: int | None
) -> None:
    assert longest_context(AutoConfig.for_model(model_type, **settings)) == longest


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 100),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 400),
        ({"rope_type": "dynamic", "factor": 2.5, "rope_theta": 1e4}, 250),
        # The config's number is the scaled one. transformers computes YaRN's ramp from it and the original
        # one.
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25, "rope_theta": 1e4},
            100,
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 50,
                "rope_theta": 1e4,
            },
            100,
        ),
    ],
)
def test_scaled_positions_are_counted_as_the_engine_counts_them(rope: dict[str, Any], longest: int) -> None:
    assert longest_context(LlamaConfig(max_position_embeddings=100, rope_parameters=rope)) == longest


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 1e4}],
)
@pytest.mark.vllm
def test_vllm_derives_the_same(rope: dict[str, Any]) -> None:
    config_module = pytest.importorskip("vllm.config.model")
    config = LlamaConfig(max_position_embeddings=100, rope_parameters=rope)

    class Architecture:
        derived_max_model_len_and_key = (float(config.max_position_embeddings), "max_position_embeddings")

    derived = config_module._get_and_verify_max_len(config, Architecture(), None, None, False, None)
    assert longest_context(config) == derived


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "awq", "bits": 4},
    ],
)
def test_quantized_weights_are_refused_by_name(quantization: dict[str, Any]) -> None:
    config = LlamaConfig()
    config.quantization_config = quantization
    with pytest.raises(
        ValueError,
        match=rf"policy.path=m: its config.json says.*\({quantization['quant_method']}\)"
        r".*give the model's unquantized weights",
    ):
        check_not_quantized(config, where="policy.path=m")
    check_not_quantized(LlamaConfig(), where="policy.path=m")
