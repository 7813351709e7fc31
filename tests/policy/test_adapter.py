"""Adapters against the base itself, a dense reference and peft's own merge."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rpt_lightning.compat.peft import adapted_layers, part_names, parts
from rpt_lightning.policy.adapter import Adapter, merged
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.pretrained.adapter_folder import read_adapter_folder, write_adapter_folder
from rpt_lightning.pretrained.weights_hash import weights_hash
from rpt_lightning.types import TrainSequence

SEQUENCES = [
    TrainSequence(prompt_ids=(9, 8, 7), target_ids=(6, 5)),
    TrainSequence(prompt_ids=(9, 8, 7), target_ids=(6, 3, 2, 11)),
    TrainSequence(prompt_ids=(9, 8), target_ids=(7, 3, 2)),
]


def policy_of(path, adapter=None, **options):
    policy = Policy(str(path), adapter=adapter, **options)
    policy.materialize()
    return policy


def tree_of(policy):
    (tree,) = policy.pack(SEQUENCES, max_tokens=100)
    return tree


@torch.no_grad()
def fill(policy, *, seed=0, size=0.05):
    """Give A and B random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in policy.named_adapter():
        parameter.copy_(torch.empty(parameter.shape).normal_(std=size, generator=generator))
    return policy


def write(policy, folder, **changes):
    folder.mkdir()
    adapter = policy.adapter
    settings = {
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "targets": ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
        "rslora": adapter.rslora,
        "base": policy.model_path,
        "base_hash": policy.base_hash,
    }
    tensors = {name: parameter.detach() for name, parameter in policy.named_adapter()}
    write_adapter_folder(folder, tensors, **settings | changes)
    return folder


@pytest.mark.parametrize("bf16", [False, True])
def test_a_new_adapter_changes_no_bit(tiny_model_dir, bf16):
    base, policy = policy_of(tiny_model_dir), policy_of(tiny_model_dir, Adapter(rank=4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for ours, theirs in zip(policy(tree_of(policy)), base(tree_of(base)), strict=True):
            assert torch.equal(ours, theirs)
    assert policy.packing == base.packing
    weights, expected = dict(named_weights(policy)), dict(named_weights(base))
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("adapter", "scale"),
    [
        (Adapter(rank=4, alpha=6.0), 1.5),
        (Adapter(rank=16, alpha=8.0, rslora=True), 2.0),
        (Adapter(rank=1, alpha=3.0, targets=["q_proj", "down_proj"]), 3.0),
    ],
)
def test_log_probs_and_gradients_are_those_of_dense_weights(tiny_model_dir, adapter, scale):
    """The reference multiplies with W + s B A, written out here, in fp64."""
    policy, base = fill(policy_of(tiny_model_dir, adapter)).double(), policy_of(tiny_model_dir).double()
    assert math.isclose(adapter.scale, scale)
    values = {name: p.detach().clone().requires_grad_() for name, p in policy.named_adapter()}
    weights = dict(base.named_parameters())
    targets = {"q_proj", "down_proj"} if adapter.rank == 1 else None
    layers = {name.partition(".lora_")[0] for name in values}
    assert all(targets is None or name.rpartition(".")[2] in targets for name in layers)
    assert len(layers) == (2 if targets else 7) * base.config.num_hidden_layers
    for name in layers:
        a, b = (values[part] for part in part_names(name))
        weights[f"model.{name}.weight"] = weights[f"model.{name}.weight"].detach() + scale * b @ a
    expected, _ = functional_call(base, weights, (tree_of(base),))
    logprobs, _ = policy(tree_of(policy))
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-10)
    (expected * torch.arange(expected.numel())).sum().backward()
    (logprobs * torch.arange(logprobs.numel())).sum().backward()
    for name, parameter in policy.named_adapter():
        assert values[name].grad.abs().max() > 1e-3, name
        torch.testing.assert_close(parameter.grad, values[name].grad, rtol=1e-6, atol=1e-9, msg=name)
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)
    assert sum(p.numel() for p in policy.trained_parameters()) == sum(v.numel() for v in values.values())


def test_fp32_gradients_are_those_of_dense_weights(tiny_model_dir):
    policy = fill(policy_of(tiny_model_dir, Adapter(rank=4, alpha=4.0)))
    exact = fill(policy_of(tiny_model_dir, Adapter(rank=4, alpha=4.0))).double()
    for one in (policy, exact):
        one(tree_of(one))[0].sum().backward()
    for (name, ours), (_, theirs) in zip(policy.named_adapter(), exact.named_adapter(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 5e-6 * theirs.grad.norm(), name


def test_merged_weights_are_w_plus_s_b_a(tiny_model_dir):
    policy = fill(policy_of(tiny_model_dir, Adapter(rank=4, alpha=10.0)))
    weights = dict(named_weights(policy))
    for name, layer in adapted_layers(policy.model).items():
        w, a, b, scale = parts(layer)
        exact = w.double() + 2.5 * b.double() @ a.double()
        assert scale == 2.5
        assert (weights[f"{name}.weight"] - exact).abs().max() < 1e-6
        assert not torch.equal(weights[f"{name}.weight"], w)
    assert set(weights) == set(policy_of(tiny_model_dir).model.state_dict())
    some = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    assert [name for name, _ in named_weights(policy, some)] == some


def test_merging_is_in_fp32_under_any_setting():
    torch.manual_seed(0)
    w, a, b = torch.randn(32, 48), torch.randn(4, 48), torch.randn(32, 4)
    expected = w + 0.5 * (b @ a)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = merged(w.bfloat16(), a, b.bfloat16(), 0.5)
            exact = merged(w, a, b, 0.5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.dtype == torch.float32
    assert (exact - expected).abs().max() < 1e-5
    assert (found - (w.bfloat16().float() + 0.5 * (b.bfloat16().float() @ a))).abs().max() < 1e-5


def test_the_start_depends_on_the_seed_and_not_on_the_order_of_draws(tiny_model_dir):
    torch.manual_seed(5)
    one = dict(policy_of(tiny_model_dir, Adapter(rank=4)).named_adapter())
    torch.rand(3)
    before = torch.get_rng_state()
    other = dict(policy_of(tiny_model_dir, Adapter(rank=4, targets=["v_proj"])).named_adapter())
    assert torch.equal(torch.get_rng_state(), before)  # nor does it move the trainer's generator
    assert 0 < len(other) < len(one)
    assert all(torch.equal(one[name], other[name]) for name in other)
    torch.manual_seed(6)
    third = dict(policy_of(tiny_model_dir, Adapter(rank=4)).named_adapter())
    for name, value in one.items():
        if ".lora_B." in name:
            assert not value.any()
        else:
            assert not torch.equal(value, third[name])
            bound = 1 / math.sqrt(value.shape[1])
            assert 0.8 * bound < value.abs().max() <= bound  # uniform, as a linear layer starts
            assert abs(value.std() - bound / math.sqrt(3)) < 0.1 * bound


def test_activation_checkpointing_changes_no_gradient(tiny_model_dir):
    gradients = []
    for checkpointing in (False, True):
        policy = fill(policy_of(tiny_model_dir, Adapter(rank=4), activation_checkpointing=checkpointing))
        policy(tree_of(policy))[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trained_parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.fixture
def bf16_dir(tiny_model_dir, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "bf16"
    )
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "bf16")
    return tmp_path / "bf16"


def test_a_frozen_base_in_bf16_changes_no_bit(bf16_dir):
    """Log-probs, gradients and what the engine gets."""
    wide, narrow = (
        fill(policy_of(bf16_dir, Adapter(rank=4, base_dtype=dtype))) for dtype in ("float32", "bfloat16")
    )
    held = {parameter.dtype: 0 for parameter in narrow.parameters()}
    for parameter in narrow.parameters():
        held[parameter.dtype] += parameter.numel()
    assert held[torch.bfloat16] > held[torch.float32] > 0
    assert all(parameter.dtype == torch.float32 for _, parameter in narrow.named_adapter())
    assert narrow.head_weight.dtype == torch.float32  # it is tied to the embedding
    for policy in (wide, narrow):
        with torch.autocast("cpu", torch.bfloat16):
            logprobs, _ = policy(tree_of(policy))
            logprobs.sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(tree_of(wide))[0], narrow(tree_of(narrow))[0])
    for (name, ours), (_, theirs) in zip(narrow.named_adapter(), wide.named_adapter(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    theirs = dict(named_weights(wide))
    assert all(torch.equal(weight.float(), theirs[name]) for name, weight in named_weights(narrow))


def test_a_base_that_bf16_would_round_is_refused(tiny_model_dir):
    with pytest.raises(ValueError, match=r"base_dtype=bfloat16 would round.*--dtype bfloat16"):
        policy_of(tiny_model_dir, Adapter(base_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"model.policy.adapter.rank=0: give a number of at least 1"),
        ({"alpha": 0.0}, r"model.policy.adapter.alpha=0.0"),
        ({"alpha": math.inf}, r"model.policy.adapter.alpha=inf"),
        ({"targets": []}, r"model.policy.adapter.targets=\[\]"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adapter(**options)


@pytest.mark.parametrize("target", ["query", "lm_head", "embed_tokens", "self_attn", "lora_A"])
def test_a_target_that_is_no_linear_layer_is_named(tiny_model_dir, target):
    with pytest.raises(ValueError, match=rf"targets: {target}: no linear layer.*It has down_proj, gate_proj"):
        policy_of(tiny_model_dir, Adapter(targets=["q_proj", target]))


def test_families_without_plain_linear_layers_are_refused(tiny_model_dir, tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    moe = Qwen3MoeConfig(
        **small,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    gpt2 = GPT2Config(
        vocab_size=512, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    for name, model, message in (
        ("moe", Qwen3MoeForCausalLM(moe), "mixture of experts"),
        ("gpt2", GPT2LMHeadModel(gpt2), "no nn.Linear layers"),
    ):
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            policy_of(tmp_path / name, Adapter())


def test_a_folder_is_the_same_adapter_for_peft_and_for_us(tiny_model_dir, tmp_path):
    policy = fill(policy_of(tiny_model_dir, Adapter(rank=4, alpha=6.0, rslora=True)))
    folder = write(policy, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), folder)
    theirs = theirs.merge_and_unload().state_dict()
    loaded = policy_of(folder)  # merged
    ours = dict(named_weights(policy))
    for name, weight in named_weights(loaded):
        assert torch.equal(weight, ours[name]), name
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6)
    assert loaded.path == str(folder)
    assert loaded.model_path == str(tiny_model_dir)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    # The same numbers in another order: 1e-5 nats.
    torch.testing.assert_close(loaded(tree_of(loaded))[0], policy(tree_of(policy))[0], rtol=0, atol=1e-5)


def test_training_continues_an_adapter(tiny_model_dir, tmp_path):
    adapter = Adapter(rank=4, alpha=6.0)
    policy = fill(policy_of(tiny_model_dir, adapter))
    folder = write(policy, tmp_path / "adapter")
    again = policy_of(folder, adapter)
    for (name, ours), (_, theirs) in zip(again.named_adapter(), policy.named_adapter(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(ValueError, match=r"holds an adapter with rank 4, alpha 6.*differ from"):
        Policy(str(folder), adapter=Adapter(rank=8, alpha=6.0))


def test_an_adapter_of_another_base_is_refused(tiny_model_dir, tmp_path):
    policy = fill(policy_of(tiny_model_dir, Adapter(rank=4)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "other")
    folder = write(policy, tmp_path / "adapter", base=str(tmp_path / "other"))
    for adapter in (None, Adapter(rank=4)):
        with pytest.raises(ValueError, match=r"was trained on weights with the hash .* another model"):
            policy_of(folder, adapter)


def test_the_hash_is_that_of_the_tensors(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    there = weights_hash(str(tiny_model_dir), where="")
    assert weights_hash(str(tmp_path / "shards"), where="") == there
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    model.save_pretrained(tmp_path / "other")
    assert weights_hash(str(tmp_path / "other"), where="") != there
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no safetensors files"):
        weights_hash(str(tmp_path / "empty"), where="policy.path=x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "no plain LoRA adapter"),
        ({"rank_pattern": {"q_proj": 2}}, "no plain LoRA adapter"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"r": "many"}, "cannot be read"),
    ],
)
def test_other_adapters_are_refused(tiny_model_dir, tmp_path, changes, message):
    import json

    folder = write(policy_of(tiny_model_dir, Adapter(rank=4)), tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        read_adapter_folder(str(folder))


def test_an_adapter_that_does_not_fit_its_base_is_named(tiny_model_dir, tmp_path):
    policy = fill(policy_of(tiny_model_dir, Adapter(rank=4)))
    tensors = {name: p.detach() for name, p in policy.named_adapter()}
    first = next(iter(tensors))
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter_folder(
        folder,
        tensors | {first: torch.zeros(4, 7)},
        rank=4,
        alpha=32.0,
        targets=("q_proj",),
        rslora=False,
        base=str(tiny_model_dir),
    )
    with pytest.raises(ValueError, match="are not those of its base"):
        policy_of(folder)
    with pytest.raises(ValueError, match="are not those of the model's layers"):
        policy_of(folder, Adapter(rank=4, targets=["q_proj"]))
