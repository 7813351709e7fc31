"""The policy compared with transformers itself, and the families that it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing.trees import pack
from rpt_lightning.policy.packing_choice import choose_packing
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.types import TrainSequence

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def save(model, tiny_model_dir, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("head_dtype", ["compute", "float32"])
def test_log_probs_and_most_likely_token_are_the_models(tiny_model_dir, head_dtype):
    policy = Policy(str(tiny_model_dir), head_dtype=head_dtype)
    policy.materialize()
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    sequences = [
        TrainSequence(prompt_ids=(9, 8, 7), target_ids=(6, 5)),
        TrainSequence(prompt_ids=(9, 8), target_ids=(7, 3, 2)),
    ]
    (tree,) = pack(sequences, max_tokens=100)
    with torch.no_grad():
        logprobs, likely = policy(tree, temperature=0.5, predict=True)
        for row, index in enumerate(tree.sequence_indices):
            ids = torch.tensor([sequences[index].prompt_ids + sequences[index].target_ids])
            start = len(sequences[index].prompt_ids)
            logits = reference(input_ids=ids).logits[0, start - 1 : -1]
            expected = (logits / 0.5).log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0]
            length = len(sequences[index].target_ids)
            torch.testing.assert_close(tree.unpack(logprobs)[row, :length], expected, rtol=0, atol=1e-5)
            assert tree.unpack(likely)[row, :length].tolist() == logits.argmax(-1).tolist()


def test_activation_checkpointing_changes_no_gradient(tiny_model_dir):
    gradients = []
    for checkpointing in (False, True):
        policy = Policy(str(tiny_model_dir), activation_checkpointing=checkpointing)
        policy.materialize()
        (tree,) = pack([TrainSequence(prompt_ids=(9, 8, 7), target_ids=(6, 5))], max_tokens=100)
        policy(tree)[0].sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_tied_head_is_delivered_under_its_own_name(tiny_model_dir):
    policy = Policy(str(tiny_model_dir))
    policy.materialize()
    weights = dict(named_weights(policy))
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert set(weights) == set(policy.model.state_dict())


def test_scaled_logits_are_refused(tiny_model_dir, tmp_path):
    path = save(
        GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)), tiny_model_dir, tmp_path / "granite"
    )
    with pytest.raises(ValueError, match="scales its logits after the head"):
        Policy(path).materialize()


ROPE = {"rope_theta": 10000.0, "factor": 4.0}
DYNAMIC, YARN = (
    ROPE | {"rope_type": "dynamic"},
    ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 512},
)
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LONGROPE = ROPE | {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 512,
}
LAYERS = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LlamaConfig(**SMALL, rope_parameters=dict(DYNAMIC)), "dynamic"),
        (LlamaConfig(**SMALL, rope_parameters=dict(LONGROPE)), "longrope"),
        (
            Gemma3TextConfig(
                **SMALL,
                **LAYERS,
                rope_parameters={
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": dict(DYNAMIC),
                },
            ),
            "dynamic",
        ),
    ],
    ids=["dynamic", "longrope", "of one type of layers"],
)
def test_rotary_frequencies_that_depend_on_the_longest_sequence_are_refused(config, name):
    with pytest.raises(
        ValueError, match=rf"policy\.path=some: its rope_type {name} .* default, linear, llama3 or yarn"
    ):
        choose_packing(config, path="some")


@pytest.mark.parametrize(
    "rope", [None, ROPE | {"rope_type": "linear"}, YARN, LLAMA3], ids=["default", "linear", "yarn", "llama3"]
)
def test_rotary_frequencies_that_stay_share_prefixes(rope):
    assert choose_packing(
        LlamaConfig(**SMALL, rope_parameters=rope and dict(rope)), path="some"
    ).shares_prefixes


SEQUENCES = [
    TrainSequence(prompt_ids=(9, 8, 7, 6, 5, 4), target_ids=(6, 5, 3)),
    TrainSequence(prompt_ids=(9, 8, 7, 6, 5, 4), target_ids=(6, 4)),
    TrainSequence(prompt_ids=(9, 8, 7), target_ids=(3, 2, 1, 4, 5)),
]


def assert_scores_are_the_models_own(policy, path):
    """Compare log-probs and gradients of packed sequences with eager attention on each sequence alone."""
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    loss = torch.zeros(())
    for sequence in SEQUENCES:
        ids, start = torch.tensor([sequence.prompt_ids + sequence.target_ids]), len(sequence.prompt_ids)
        logprobs = reference(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        loss = (
            loss
            + (
                logprobs.gather(-1, ids[0, start:, None])[:, 0]
                * torch.arange(1.0, len(sequence.target_ids) + 1)
            ).sum()
        )
    loss.backward()
    ours = torch.zeros(())
    for tree in policy.pack(SEQUENCES, max_tokens=24):
        rows = tree.unpack(policy(tree)[0])
        ours = ours + (rows * torch.arange(1.0, rows.shape[1] + 1)).sum()
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
    expected = {
        name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None
    }
    actual = {
        name: parameter.grad
        for name, parameter in policy.model.named_parameters()
        if parameter.grad is not None
    }
    assert expected.keys() == actual.keys()
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert torch.cat([(actual[name] - expected[name]).flatten() for name in expected]).norm() < 1e-5 * norm


def test_sliding_windows_share_prefixes_exactly(tiny_model_dir, tmp_path):
    """The window is 4 tokens of the path. A window over places in the packed tree would see other tokens."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1, initializer_range=0.3
    )
    path = save(Qwen2ForCausalLM(config), tiny_model_dir, tmp_path / "qwen")
    policy = Policy(path)
    policy.materialize()
    assert policy.packing == "Qwen2ForCausalLM: common prefixes are computed once"
    assert policy.model.config.sliding_window == policy.model.model.layers[1].self_attn.sliding_window == 4
    assert_scores_are_the_models_own(policy, path)


def test_linear_attention_gets_rows(tiny_model_dir, tmp_path):
    torch.manual_seed(0)
    config = Lfm2Config(**SMALL, full_attn_idxs=[1], initializer_range=0.3, block_multiple_of=8)
    path = save(Lfm2ForCausalLM(config), tiny_model_dir, tmp_path / "lfm")
    policy = Policy(path)
    policy.materialize()
    assert (
        policy.packing
        == "Lfm2ForCausalLM: every completion with its whole prompt, because it has layers with conv"
    )
    assert_scores_are_the_models_own(policy, path)


def test_capped_attention_gets_rows(tiny_model_dir, tmp_path):
    """The kernels of trees, and sdpa, would silently ignore the cap."""
    torch.manual_seed(0)
    options = {
        "head_dim": 16,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": 0.5,
        "sliding_window": 4,
        "initializer_range": 0.3,
    }
    path = save(Gemma2ForCausalLM(Gemma2Config(**SMALL, **options)), tiny_model_dir, tmp_path / "gemma")
    policy = Policy(path)
    policy.materialize()
    assert "caps its attention scores" in policy.packing
    assert_scores_are_the_models_own(policy, path)


def test_values_narrower_than_queries_get_rows():
    """The values of latent attention (MLA) are narrower than the queries.

    The kernels of trees would write them into a place as wide as the queries.
    """
    widths = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    packing = choose_packing(DeepseekV3Config(**SMALL, **widths, first_k_dense_replace=2), path="some")
    assert packing.attention == "eager"
    assert "heads of 16 numbers for queries and 8 for values" in packing.reason


def test_autocast_computes_in_bf16_and_stays_near(tiny_model_dir):
    policy = Policy(str(tiny_model_dir))
    policy.materialize()
    (tree,) = policy.pack(SEQUENCES, max_tokens=100)
    exact, _ = policy(tree)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = policy(tree)
        rounded.sum().backward()
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)
    assert all(parameter.grad.dtype == torch.float32 for parameter in policy.parameters())


@pytest.mark.long
def test_compiled_layers_give_the_same_gradient(tiny_model_dir):
    policy = Policy(str(tiny_model_dir), compile_layers=True)
    policy.materialize()
    assert_scores_are_the_models_own(policy, str(tiny_model_dir))


def test_dropout_is_refused(tiny_model_dir, tmp_path):
    path = save(
        GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2)),
        tiny_model_dir,
        tmp_path / "gpt2",
    )
    with pytest.raises(ValueError, match="has dropout"):
        Policy(path).materialize()
    folder = tmp_path / "llama"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    with pytest.raises(ValueError, match="attention_dropout"):
        Policy(str(folder)).materialize()


def test_weights_outside_of_the_parameters_are_refused(tiny_model_dir, tmp_path):
    config = DeepseekV3Config(
        vocab_size=512, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    path = save(DeepseekV3ForCausalLM(config), tiny_model_dir, tmp_path / "deepseek")
    with pytest.raises(
        ValueError,
        match=r"1 of its weights are not parameters \(model.layers.1.mlp.gate.e_score_correction_bias\)",
    ):
        Policy(path).materialize()


def test_dropout_of_heads_that_no_language_model_has_is_not_refused(tiny_model_dir, tmp_path):
    """Pythia's config.json has classifier_dropout 0.1, and GPT-2's has summary_first_dropout."""
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    )
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=512, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
    )
    assert neox.config.classifier_dropout == gpt2.config.summary_first_dropout == 0.1
    for model in (neox, gpt2):
        policy = Policy(save(model, tiny_model_dir, tmp_path / type(model).__name__))
        policy.materialize()
        assert policy.packing.startswith(type(model).__name__)


def test_folder_without_a_model_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        Policy(str(tmp_path))


def test_tokens_without_an_embedding_are_refused_before_the_start(tiny_model_dir, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(tiny_model_dir, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(path)
    with pytest.raises(
        ValueError,
        match=r"policy\.path=.*model: its tokenizer has 2 tokens .*'<think>', '</think>', id 512 "
        r".*resize_token_embeddings",
    ):
        Policy(str(path))


def test_a_sequence_with_a_token_without_an_embedding_is_refused(tiny_model_dir):
    policy = Policy(str(tiny_model_dir))
    with pytest.raises(ValueError, match=r"has the id 512, and the model's embedding has 512 rows"):
        policy.pack(
            [
                TrainSequence(prompt_ids=(5,), target_ids=(511,)),
                TrainSequence(prompt_ids=(5, 512), target_ids=(6,)),
            ],
            max_tokens=8,
        )
