"""Sharded policies, read shard by shard from the model's files, against the whole `from_pretrained`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded_worker import three_steps, work
from torch.multiprocessing import spawn
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rpt_lightning.policy.adapter import Adapter
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.parallel.tensor_parallel import parallelize
from rpt_lightning.pretrained.adapter_folder import write_adapter_folder

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def sharded(shape, path, folder, *, bf16=False, **options):
    spawn(work, (shape, str(path), folder / "result.pt", options, bf16), nprocs=shape[0] * shape[1])
    return torch.load(folder / "result.pt", weights_only=True)


def whole(path, *, bf16=False, adapter=None):
    policy = Policy(str(path), adapter=adapter and Adapter(**adapter))
    policy.materialize()
    return three_steps(policy, bf16=bf16) | {"base_hash": policy.base_hash}


def flat(weights, names):
    return torch.cat([weights[name].flatten() for name in names])


def check(ours, reference, *, tolerance=1e-4, logprob_tolerance=1e-5):
    names = sorted(reference["start"])
    assert sorted(ours["start"]) == names
    # The policy starts from exactly what is in the files.
    assert torch.equal(flat(ours["start"], names), flat(reference["start"], names))
    torch.testing.assert_close(ours["logprobs"], reference["logprobs"], rtol=0, atol=logprob_tolerance)
    assert ours["norms"] == pytest.approx(reference["norms"], rel=max(1e-4, tolerance / 10))
    update = flat(reference["end"], names) - flat(reference["start"], names)
    assert (flat(ours["end"], names) - flat(reference["end"], names)).norm() < tolerance * update.norm()
    assert ours["dtypes"] == {torch.float32}


def test_two_shards_are_the_whole(tiny_model_dir, tmp_path):
    ours = sharded((2, 1), tiny_model_dir, tmp_path)
    reference = whole(tiny_model_dir)
    check(ours, reference)
    assert ours["is_tied"]
    assert torch.equal(ours["end"]["lm_head.weight"], ours["end"]["model.embed_tokens.weight"])
    total = sum(weight.numel() for name, weight in reference["start"].items() if name != "lm_head.weight")
    assert ours["num_held"] == pytest.approx(total / 2, rel=0.01)


@pytest.fixture
def families(tiny_model_dir, tmp_path):
    """Models with biases (Qwen2), norms of single heads (Qwen3) and untied heads.

    Their weights are far from the initial values, and their files are in bf16.
    """

    def make(name):
        torch.manual_seed(0)
        if name == "llama":
            return tiny_model_dir
        model = {
            "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False)),
            "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=False)),
        }[name]()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.to(torch.bfloat16).save_pretrained(tmp_path / name, max_shard_size="50KB")
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.long
@pytest.mark.parametrize(("name", "shape"), [("llama", (1, 2)), ("qwen2", (1, 2)), ("qwen3", (2, 2))])
def test_tensor_parallel_is_the_whole(families, tmp_path, name, shape):
    path = families(name)
    check(sharded(shape, path, tmp_path), whole(path), logprob_tolerance=1e-4, tolerance=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [{"cpu_offload": True}, {"activation_checkpointing": True}],
    ids=["cpu_offload", "activation_checkpointing"],
)
def test_flags_change_nothing(families, tmp_path, options):
    path = families("qwen3")
    check(sharded((2, 1), path, tmp_path, **options), whole(path), logprob_tolerance=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_adapter_in_two_shards_is_the_whole(families, tmp_path, name):
    """The same A from the first rank's seed, the same steps, and merged weights gathered from shards."""
    path, adapter = families(name), {"rank": 4, "alpha": 8.0}
    ours = sharded((2, 1), path, tmp_path, adapter=adapter)
    torch.manual_seed(0)
    reference = whole(path, adapter=adapter)
    check(ours, reference, logprob_tolerance=1e-4)
    changed = [name for name, weight in ours["start"].items() if not torch.equal(weight, ours["end"][name])]
    assert len(changed) == 7 * (2 if name == "qwen2" else 4)  # the matrices of the layers, and nothing else
    assert ours["base_hash"] == reference["base_hash"]


@pytest.mark.long
def test_a_frozen_base_in_bf16_is_sharded_as_it_is(families, tmp_path):
    adapter = {"rank": 4, "alpha": 8.0, "base_dtype": "bfloat16"}
    path = families("qwen2")  # in bf16, untied
    ours = sharded((2, 1), path, tmp_path, adapter=adapter, bf16=True)
    torch.manual_seed(0)
    reference = whole(path, bf16=True, adapter=adapter | {"base_dtype": "float32"})
    names = sorted(reference["start"])
    assert torch.equal(flat(ours["start"], names).float(), flat(reference["start"], names))
    torch.testing.assert_close(ours["logprobs"], reference["logprobs"], rtol=0, atol=1e-2)
    assert torch.equal(ours["logprobs"][0], reference["logprobs"][0])  # before the first update
    assert ours["dtypes"] == {torch.bfloat16, torch.float32}


@pytest.mark.long
def test_an_adapter_folder_is_merged_into_shards(families, tmp_path):
    path = families("qwen2")
    policy = Policy(str(path), adapter=Adapter(rank=4))
    policy.materialize()
    torch.manual_seed(1)
    for _, parameter in policy.named_adapter():
        torch.nn.init.normal_(parameter, std=0.1)
    (tmp_path / "adapter").mkdir()
    write_adapter_folder(
        tmp_path / "adapter",
        {name: parameter.detach() for name, parameter in policy.named_adapter()},
        rank=4,
        alpha=32.0,
        targets=("q_proj",),
        rslora=False,
        base=str(path),
        base_hash=policy.base_hash,
    )
    check(sharded((2, 1), tmp_path / "adapter", tmp_path), whole(tmp_path / "adapter"), tolerance=1e-3)


def test_an_adapter_is_not_divided_over_devices(tiny_model_dir):
    policy = Policy(str(tiny_model_dir), adapter=Adapter(rank=4))
    policy.materialize_on_meta()
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3: model.policy.adapter is not supported"):
        parallelize(policy, Mesh())


@pytest.mark.long
def test_layers_gathered_in_bf16_differ_by_its_rounding_only(tiny_model_dir, tmp_path):
    ours, reference = (
        sharded((2, 1), tiny_model_dir, tmp_path, bf16=True, gather_bf16=True),
        whole(tiny_model_dir, bf16=True),
    )
    exact = whole(tiny_model_dir)
    noise = (reference["logprobs"] - exact["logprobs"]).abs().max()
    # Activations between layers are bf16 too.
    assert 0 < (ours["logprobs"] - exact["logprobs"]).abs().max() < 4 * noise
    assert ours["norms"] == pytest.approx(exact["norms"], rel=0.03)
    assert ours["dtypes"] == {torch.float32}
    # Master weights are not rounded.
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in ours["end"].values())


def test_files_that_lack_a_tensor_are_named(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    save_file(
        {name: tensor for name, tensor in load_file(file).items() if name != "model.norm.weight"},
        file,
        metadata={"format": "pt"},
    )
    from rpt_lightning.policy.parallel.sharding import _read_shards

    policy = Policy(str(tmp_path / "model"))
    policy.materialize_on_meta()
    with pytest.raises(ValueError, match=r"lacks \['model.norm.weight'\].*strategy without shards"):
        _read_shards(policy)


class Mesh:
    def size(self):
        return 3


def test_heads_that_cannot_be_divided_are_named(tiny_model_dir, tmp_path):
    policy = Policy(str(tiny_model_dir))
    policy.materialize_on_meta()
    with pytest.raises(
        ValueError, match=r"tensor_parallel_size=3: .*'num_attention_heads': 4.*cannot be divided by 3"
    ):
        parallelize(policy, Mesh())
    folder = tmp_path / "moe"
    shutil.copytree(tiny_model_dir, folder)
    policy.config.base_model_tp_plan = {"layers.*.mlp.experts": "moe_tp_experts"}
    with pytest.raises(ValueError, match=r"has a plan with \['moe_tp_experts'\]"):
        parallelize(policy, Mesh())


def test_logits_after_meta_are_those_of_from_pretrained(tiny_model_dir, tmp_path):
    """The rotary base is not the default.

    Buffers that are not in a checkpoint must be computed from this config.
    """
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}})
    )
    from_file, on_meta, other = Policy(str(folder)), Policy(str(folder)), Policy(str(tiny_model_dir))
    from_file.materialize()
    other.materialize()
    on_meta.materialize_on_meta()
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    buffers, expected = dict(on_meta.named_buffers()), dict(from_file.named_buffers())
    assert buffers.keys() == expected.keys()
    assert buffers
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)
    assert any(not torch.equal(buffers[name], dict(other.named_buffers())[name]) for name in buffers)
