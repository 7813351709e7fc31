"""The policy against transformers itself, and the families that it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing import pack
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.types import TrainSequence

SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def save(model, tiny_model_dir, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("head_dtype", ["compute", "float32"])
def test_log_probs_and_most_likely_token_are_the_models(tiny_model_dir, head_dtype):
    policy = Policy(str(tiny_model_dir), head_dtype=head_dtype)
    policy.materialize()
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    sequences = [TrainSequence(prompt_ids=(9, 8, 7), target_ids=(6, 5)), TrainSequence(prompt_ids=(9, 8), target_ids=(7, 3, 2))]
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
    path = save(GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)), tiny_model_dir, tmp_path / "granite")
    with pytest.raises(ValueError, match="other log-probs packed than alone"):
        Policy(path).materialize()


def test_sliding_windows_are_refused(tiny_model_dir, tmp_path):
    config = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ValueError, match="sliding_attention"):
        Policy(save(Qwen2ForCausalLM(config), tiny_model_dir, tmp_path / "qwen")).materialize()


def test_dropout_is_refused(tiny_model_dir, tmp_path):
    path = save(GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2)), tiny_model_dir, tmp_path / "gpt2")
    with pytest.raises(ValueError, match="has dropout"):
        Policy(path).materialize()
    folder = tmp_path / "llama"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    with pytest.raises(ValueError, match="attention_dropout"):
        Policy(str(folder)).materialize()


def test_folder_without_a_model_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        Policy(str(tmp_path))
