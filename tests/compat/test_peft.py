from __future__ import annotations

from pathlib import Path

import peft
import torch
from peft.tuners.lora import Linear
from reliance import check_takes
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rpt_lightning.compat import peft as compat

TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def test_layers_get_an_adapter_without_values_and_without_random_numbers() -> None:
    model, before = LlamaForCausalLM(TINY), torch.get_rng_state()
    compat.inject(model, rank=2, alpha=3.0, targets=["up_proj", "q_proj"], rslora=False)
    assert torch.equal(torch.get_rng_state(), before), "peft now draws random numbers"
    layers = compat.adapted_layers(model)
    assert set(layers) == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    names = dict(model.named_parameters())
    for name, layer in layers.items():
        weight, a, b, scale = compat.parts(layer)
        assert names[f"{name}{compat.BASE}weight"] is weight, "peft has renamed base_layer"
        assert [names[part] for part in compat.part_names(name)] == [a, b], "peft has renamed A or B"
        assert (a.shape[0], b.shape[1], scale) == (2, 2, 1.5)
        assert a.is_meta
        assert b.is_meta
        assert not layer.cast_input_dtype_enabled
    assert {name for name, parameter in names.items() if parameter.requires_grad} == {
        part for name in layers for part in compat.part_names(name)
    }, "peft no longer freezes everything else"
    assert model.peft_config, "peft no longer marks the model"


def test_a_layer_computes_what_its_parts_say() -> None:
    torch.manual_seed(0)
    config = compat.lora_config(rank=4, alpha=6.5, targets=["x"], rslora=True)
    layer = Linear(nn.Linear(3, 5), "default", config, r=4, lora_alpha=6.5)
    weight, a, b, scale = compat.parts(layer)
    assert scale == 6.5 / 2
    with torch.no_grad():
        b.normal_()
    x = torch.randn(7, 3)
    expected = x @ (weight + scale * b @ a).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_names_and_files_are_those_of_peft(tmp_path: Path) -> None:
    check_takes(peft.inject_adapter_in_model, "low_cpu_mem_usage", "adapter_name", used_by=compat.inject)
    config = compat.lora_config(rank=2, alpha=4.0, targets=["q_proj"], rslora=False, base="a/base")
    model = peft.get_peft_model(LlamaForCausalLM(TINY), config)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    held = load_file(tmp_path / compat.WEIGHTS_FILE)
    own = [
        name for layer in compat.adapted_layers(model.base_model.model) for name in compat.part_names(layer)
    ]
    assert {compat.name_in_file(name) for name in own} == set(held), "peft has renamed tensors in its files"
    assert {compat.name_in_model(name) for name in held} == set(own)
    assert compat.name_in_model("base_model.model.lm_head.weight") is None
    kinds = {compat.split_part_name(name)[1] for name in own}
    assert kinds == {"lora_A", "lora_B"}
    config = compat.lora_config(rank=2, alpha=4.0, targets=["q_proj"], rslora=False, base="a/base")
    compat.save_config(config, tmp_path / "config")
    read = peft.LoraConfig.from_pretrained(tmp_path / "config")
    assert (read.r, read.lora_alpha, read.target_modules) == (2, 4, {"q_proj"})
    assert read.base_model_name_or_path == "a/base"
    assert (tmp_path / "config" / compat.CONFIG_FILE).is_file()
