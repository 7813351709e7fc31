"""A policy's self-check sees every parameter, training mode and the folder's own weights."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    GPTJConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PhimoeConfig,
    PreTrainedModel,
)

from rpt_lightning.policy import packing_choice as family
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing_choice import choose_packing, small_copy
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.engines.hf_engine import HFEngine
from rpt_lightning.types import GenerationRequest, SamplingSettings, TrainSequence

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
PHI = PhiConfig(**SMALL, bos_token_id=None, eos_token_id=0)
GPTJ = GPTJConfig(
    vocab_size=512,
    n_embd=32,
    n_layer=2,
    n_head=2,
    rotary_dim=8,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=0,
)
SEQUENCES = [
    TrainSequence(prompt_ids=(9, 8, 7), target_ids=(6, 5, 3)),
    TrainSequence(prompt_ids=(9, 8, 7), target_ids=(6, 4)),
]


def saved(config, tiny_model_dir, folder) -> str:
    """Save a model in which every parameter is random, including biases and norms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("config", [PHI, GPTJ], ids=["phi", "gptj"])
def test_a_head_with_a_bias_is_right(config, tiny_model_dir, tmp_path) -> None:
    """Log-probs, most likely tokens and the bias's gradient equal those of transformers.

    The engine that gets the weights draws from the same distribution.
    """
    path = saved(config, tiny_model_dir, tmp_path / "model")
    policy = Policy(path)
    policy.materialize()
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert reference.lm_head.bias.abs().max() > 0.5
    ours, theirs = torch.zeros(()), torch.zeros(())
    for tree in policy.pack(SEQUENCES, max_tokens=64):
        logprobs, likely = policy(tree, predict=True)
        for row, index in enumerate(tree.sequence_indices):
            sequence = SEQUENCES[index]
            ids, start, length = (
                torch.tensor([sequence.prompt_ids + sequence.target_ids]),
                len(sequence.prompt_ids),
                len(sequence.target_ids),
            )
            logits = reference(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0]
            torch.testing.assert_close(tree.unpack(logprobs)[row, :length], expected, rtol=0, atol=1e-4)
            assert tree.unpack(likely)[row, :length].tolist() == logits.argmax(-1).tolist()
            theirs = theirs + expected.sum()
            ours = ours + tree.unpack(logprobs)[row, :length].sum()
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(policy.model.lm_head.bias.grad, reference.lm_head.bias.grad, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        policy.model.lm_head.weight.grad, reference.lm_head.weight.grad, rtol=1e-3, atol=1e-3
    )

    with HFEngine(dtype="float32") as engine:
        engine.start(path, seed=0, max_model_len=32)
        engine.update_weights(named_weights(policy), version=0)
        sampling = SamplingSettings(temperature=1.0, max_tokens=4, stop_token_ids=(0,))
        request = GenerationRequest(task_id="t", prompt_ids=(9, 8, 7), n=2, seed=0, sampling=sampling)
        ((first, _),) = engine.generate([request])
    (tree,) = policy.pack([TrainSequence(prompt_ids=(9, 8, 7), target_ids=first.token_ids)], max_tokens=64)
    torch.testing.assert_close(
        tree.unpack(policy(tree)[0])[0], torch.tensor(first.rollout_logprobs), rtol=0, atol=1e-4
    )


def test_every_parameter_of_the_copy_is_random() -> None:
    """Zeros and ones would hide an error that leaves out a bias or a norm."""
    for config in (PHI, GPTJ, LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)):
        for name, parameter in small_copy(config).named_parameters():
            assert parameter.detach().flatten().unique().numel() > 0.9 * parameter.numel(), name


def test_a_forgotten_bias_would_be_found(monkeypatch) -> None:
    monkeypatch.setattr("rpt_lightning.policy.tree_scores.head_bias", lambda model: None)
    with pytest.raises(
        ValueError,
        match=r"policy\.path=some: the log-probs of PhiForCausalLM differ from those of its hidden states "
        r"and output head",
    ):
        choose_packing(PHI, path="some")


OPT = {
    "vocab_size": 512,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
}


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (
            MixtralConfig(**SMALL, num_local_experts=4, router_jitter_noise=0.2),
            r"'router_jitter_noise': 0\.2",
        ),
        (PhimoeConfig(**SMALL, num_local_experts=4), r"'router_jitter_noise': 0\.01"),
        (OPTConfig(**OPT, layerdrop=0.5), r"'layerdrop': 0\.5"),
    ],
    ids=["mixtral", "phimoe", "opt"],
)
def test_what_is_random_in_training_only_is_refused(config, cause) -> None:
    state = torch.random.get_rng_state()
    with pytest.raises(
        ValueError, match=rf"policy\.path=some: .* in training mode than in evaluation.*{cause}"
    ):
        choose_packing(config, path="some")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "config", [MixtralConfig(**SMALL, num_local_experts=4), OPTConfig(**OPT)], ids=["mixtral", "opt"]
)
def test_the_same_families_without_noise_are_taken(config) -> None:
    assert choose_packing(config, path="some").shares_prefixes


def test_scaled_logits_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"policy\.path=some: the log-probs of CohereForCausalLM differ"):
        choose_packing(CohereConfig(**SMALL), path="some")


def test_the_second_call_is_looked_at_too(monkeypatch) -> None:
    """The first call of this model leaves state behind."""
    forward, calls = family.score, []

    def drifting(model, tree):
        calls.append(tree)
        logprobs, entropy = forward(model, tree)
        return logprobs + 0.01 * (len(calls) % 2 == 0), entropy

    monkeypatch.setattr(family, "score", drifting)
    with pytest.raises(ValueError, match="differ from those of its hidden states"):
        choose_packing(LlamaConfig(**SMALL), path="some")


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_the_kernel_of_the_training_device_decides(error, monkeypatch) -> None:
    """Trees are compared on the device that trains, and rows are chosen if its kernel gets them wrong.

    The other device is a CPU here whose tree attention is wrong, because this test runs without a GPU.
    """
    forward = family.score
    device = torch.device("cpu", 0)

    def on_device(model, tree):
        logprobs, entropy = forward(model, tree)
        return logprobs + error * model.config._attn_implementation.count(family.NAME), entropy

    moved = []
    to = PreTrainedModel.to
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, where: moved.append(where) or to(model, where))
    monkeypatch.setattr(family, "score", on_device)
    packing = choose_packing(LlamaConfig(**SMALL), path="some", device=device)
    assert moved == [device]
    assert packing.shares_prefixes == (error == 0)
    assert packing.reason is None or "packed as a tree its log-probs differ by 0.1" in packing.reason


def test_trees_are_compared_without_tf32(monkeypatch) -> None:
    """With TF32 a right kernel would be off by more than the tolerance, and rows would be chosen."""
    forward, precisions = family.score, []

    def recorded(model, tree):
        precisions.append(torch.get_float32_matmul_precision())
        return forward(model, tree)

    monkeypatch.setattr(family, "score", recorded)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        choose_packing(LlamaConfig(**SMALL), path="some")
        assert (torch.get_float32_matmul_precision(), set(precisions)) == ("medium", {"highest"})
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_policy_tells_the_device_that_it_trains_on(tiny_model_dir, monkeypatch) -> None:
    asked = []
    choose = family.choose_packing

    def recorded(config, *, device, **kwargs):
        asked.append(device)
        return choose(config, device=torch.device("cpu"), **kwargs)

    monkeypatch.setattr("rpt_lightning.policy.model.choose_packing", recorded)
    policy = Policy(str(tiny_model_dir), compile_layers=False)
    policy.train_on(torch.device("cuda", 1))
    policy.materialize()
    assert asked == [torch.device("cuda", 1)]


def test_the_folders_own_weights_are_compared_at_load(tiny_model_dir, monkeypatch) -> None:
    """The check at load sees what the small copy cannot show, such as a layer treated by its number."""
    monkeypatch.setattr(
        "rpt_lightning.policy.model.choose_packing",
        lambda *args, **kwargs: family.Packing(attention=family.NAME, reason=None),
    )
    forward = family.score
    monkeypatch.setattr(family, "score", lambda model, tree: (forward(model, tree)[0] + 0.1, None))
    policy = Policy(str(tiny_model_dir))
    with pytest.raises(
        ValueError,
        match=rf"policy\.path={tiny_model_dir}: with the folder's weights, the log-probs of LlamaForCausalLM "
        r".*difference 0\.1 nats",
    ):
        policy.materialize()
    assert not hasattr(policy, "model")
