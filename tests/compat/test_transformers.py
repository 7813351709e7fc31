from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reliance import check_source, check_takes
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    modeling_rope_utils,
    modeling_utils,
)
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.utils.hub import cached_file, cached_files

from rpt_lightning.compat import transformers as compat

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 8,
}
DENSE = (LlamaConfig, Qwen2Config, Qwen3Config)


def build(config: PreTrainedConfig, **options: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def test_the_attention_function_can_be_read_back() -> None:
    model = build(LlamaConfig(**SIZES), attn_implementation="sdpa")
    assert compat.attention_name(model) == "sdpa"
    model.set_attn_implementation("eager")
    assert compat.attention_name(model) == "eager"
    model.set_attn_implementation(compat.attention_name(model))
    assert compat.supports_sdpa(model)


@pytest.mark.parametrize("config", DENSE)
def test_layers_and_heads_have_the_usual_names(config: type[PreTrainedConfig]) -> None:
    model = build(config(**SIZES, head_dim=8))
    layers = compat.decoder_layers(model)
    assert len(layers) == 2
    assert compat.attention_facts(layers[0]) == (8, config is Qwen3Config)


@pytest.mark.parametrize("config", DENSE)
def test_plans_for_tensor_parallelism_have_styles_that_we_know(config: type[PreTrainedConfig]) -> None:
    plan = compat.layer_plan(config(**SIZES))
    assert plan["layers.*.self_attn.q_proj"] == "colwise"
    assert plan["layers.*.mlp.down_proj"] == "rowwise"
    styles = {"colwise", "rowwise", "replicated_with_grad_allreduce"}
    assert set(plan.values()) <= styles, f"{config.__name__} now needs {set(plan.values()) - styles}"
    assert compat.layer_plan(object()) == {}


def test_rotary_types_that_depend_on_a_call_are_known_by_name() -> None:
    check_source(
        modeling_rope_utils.dynamic_rope_update,
        'if "dynamic" in rope_type',
        'elif rope_type == "longrope"',
        used_by=compat.rope_depends_on_call,
    )
    types = [*modeling_rope_utils.ROPE_INIT_FUNCTIONS, "default"]
    assert {kind for kind in types if compat.rope_depends_on_call(kind)} == {"dynamic", "longrope"}


def test_layers_pass_what_changes_their_scores_under_these_names() -> None:
    assert compat.SCORE_CHANGES == ("softcap", "s_aux")
    check_source(modeling_gemma2.Gemma2Attention, "softcap=", used_by="policy.tree_attention")
    check_source(modeling_gpt_oss.GptOssAttention, "s_aux=", used_by="policy.tree_attention")


def test_names_that_may_be_left_over_in_files() -> None:
    model = build(LlamaConfig(**SIZES))
    assert {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"} <= compat.ignored_names(model)
    model._keys_to_ignore_on_load_unexpected = {"mtp.*"}
    assert "mtp.*" in compat.ignored_names(model)
    check_source(
        modeling_utils.PreTrainedModel,
        r'r"rotary_emb\.inv_freq"',
        r'r"(^|\.)position_ids$"',
        used_by=compat.ignored_names,
    )


def test_weights_are_converted_to_those_of_the_files() -> None:
    dense = build(LlamaConfig(**SIZES))
    mixture = build(MixtralConfig(**SIZES, num_local_experts=3))
    assert (compat.converts_weights(dense), compat.converts_weights(mixture)) == (False, True)
    assert not compat.type_converts_weights("llama")
    assert compat.type_converts_weights("mixtral")
    parameters = dict(mixture.named_parameters())
    name = next(name for name in parameters if name.endswith("experts.down_proj"))
    in_files = compat.as_in_files(mixture, {name: parameters[name]})
    assert len(in_files) == 3, f"one tensor of all experts became {sorted(in_files)}"
    assert {tuple(tensor.shape) for tensor in in_files.values()} == {(16, 32)}
    weight = dense.get_output_embeddings().weight
    assert compat.as_in_files(dense, {"lm_head.weight": weight})["lm_head.weight"] is weight


def test_configurations_differ_only_in_how_they_were_read(tmp_path: Path) -> None:
    def said(config: Any) -> dict[str, Any]:
        entries = json.loads(config.to_json_string(use_diff=False))
        return {name: value for name, value in entries.items() if name not in compat.READING_ENTRIES}

    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    used = AutoConfig.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(used, dtype=torch.bfloat16, attn_implementation="eager")
    assert said(read) == said(used), "a configuration now records something else about how it is used"
    assert said(read) != said(LlamaConfig(**SIZES | {"hidden_size": 32}))


def test_a_missing_file_of_a_hub_id_can_be_no_error() -> None:
    check_source(cached_file, "cached_files(", "**kwargs", used_by=compat.cached_path)
    check_takes(
        cached_files,
        "_raise_exceptions_for_gated_repo",
        "_raise_exceptions_for_missing_entries",
        "_raise_exceptions_for_connection_errors",
        used_by=compat.cached_path,
    )


def test_a_chat_template_takes_our_clock(tiny_tokenizer: Any) -> None:
    """`tasks.chat_template` passes it, so that a template writes the same date in every run."""
    text = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}],
        chat_template="{{ strftime_now('%Y') }}",
        tokenize=False,
        strftime_now=lambda form: f"then {form}",
    )
    assert text == "then %Y", "apply_chat_template no longer lets an argument replace strftime_now"
