"""Folders whose weights do not fit their config are each rejected with the names of the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rpt_lightning.policy.model import Policy
from rpt_lightning.pretrained.weights import load_causal_lm

NORM, QUERY = "model.layers.3.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def rewrite(folder: Path, **weights: torch.Tensor | None) -> None:
    """Change the weights of the file. None removes one. Double underscores stand for the dots of a name."""
    content = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        content.pop(name.replace("__", "."), None)
        if tensor is not None:
            content[name.replace("__", ".")] = tensor
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def key(name: str) -> str:
    return name.replace(".", "__")


def without_a_norm(folder: Path) -> None:
    rewrite(folder, **{key(NORM): None})


def under_another_name(folder: Path) -> None:
    rewrite(
        folder,
        **{
            key(QUERY): None,
            key(QUERY).replace("q_proj", "query"): load_file(folder / "model.safetensors")[QUERY],
        },
    )


def all_under_other_names(folder: Path) -> None:
    content = {"net." + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def fewer_layers(folder: Path) -> None:
    reconfigure(folder, num_hidden_layers=5)


def more_layers(folder: Path) -> None:
    reconfigure(folder, num_hidden_layers=3)


def biases(folder: Path) -> None:
    rewrite(folder, **{key("model.layers.0.self_attn.q_proj.bias"): torch.ones(128)})


def head_bias(folder: Path) -> None:
    rewrite(folder, lm_head__bias=torch.ones(512))


def other_shape(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.ones(64))


def another_head(folder: Path) -> None:
    rewrite(folder, lm_head__weight=torch.randn(512, 128))


def not_a_number(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.full((128,), float("nan")))


def infinite(folder: Path) -> None:
    weight = load_file(folder / "model.safetensors")[QUERY]
    weight[3, 5] = float("inf")
    rewrite(folder, **{key(QUERY): weight})


def cut_off(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def text(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")


def absent(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


WRONG = {
    without_a_norm: rf"lack 1 \({NORM}\)",
    under_another_name: rf"lack 1 \({QUERY}\); they hold 1 \(model\.layers\.1\.self_attn\.query\.weight\)",
    all_under_other_names: r"lack 39 \(lm_head\.weight, model\.embed_tokens\.weight, "
    r".*hold 38 \(net\.model\.embed_tokens\.weight, ",
    fewer_layers: r"lack 9 \(model\.layers\.4\.input_layernorm\.weight, ",
    more_layers: r"hold 9 \(model\.layers\.3\.input_layernorm\.weight, .*does not have",
    biases: r"hold 1 \(model\.layers\.0\.self_attn\.q_proj\.bias\)",
    head_bias: r"hold 1 \(lm_head\.bias\)",
    other_shape: r"other shapes .*1 \(model\.norm\.weight\) "
    r"\(model\.norm\.weight: \[64\] instead of \[128\]\)",
    another_head: "ties the output head to the embedding",
    not_a_number: r"1 \(model\.norm\.weight\) of its weights hold NaN or infinity",
    infinite: rf"1 \({QUERY}\) of its weights hold NaN or infinity",
    cut_off: "cannot be loaded",
    text: "cannot be loaded",
    absent: "cannot be loaded",
}


@pytest.mark.parametrize("damage", WRONG, ids=lambda damage: damage.__name__)
def test_a_wrong_model_is_refused_with_the_names_of_its_weights(damage, folder: Path, caplog) -> None:
    damage(folder)
    policy = Policy(str(folder))
    with pytest.raises(ValueError, match=rf"(?s)^policy\.path={folder}: .*{WRONG[damage]}") as refusal:
        policy.materialize()
    assert "\n" not in str(refusal.value)
    assert "LOAD REPORT" not in caplog.text


def test_a_right_model_is_loaded_as_transformers_does(folder: Path) -> None:
    ours = load_causal_lm(str(folder), where="--proxy", dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert all(torch.equal(ours.state_dict()[name], weight) for name, weight in theirs.state_dict().items())


@pytest.mark.parametrize(
    "weights",
    [
        {"v_head__summary__weight": torch.ones(1, 128)},  # trl's value head
        {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(16)},  # saved by older versions
        {"lm_head__weight": None},  # tied, and stored once
    ],
    ids=["value head", "rotary frequencies", "tied head"],
)
def test_what_is_no_part_of_the_model_is_passed_over(weights, folder: Path) -> None:
    rewrite(folder, **weights)
    load_causal_lm(str(folder), where="--proxy", dtype=torch.float32)


def test_a_tied_head_that_is_stored_twice_is_one(folder: Path) -> None:
    rewrite(
        folder, lm_head__weight=load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    )
    model = load_causal_lm(str(folder), where="--proxy", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
