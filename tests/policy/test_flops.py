"""The count of operations, checked by hand and against torch's own counter on real models."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rpt_lightning.compat.torch import map_tensors
from rpt_lightning.policy.adapter import Adapter, add_adapter
from rpt_lightning.policy.flops import (
    ModelSize,
    Work,
    add_works,
    forward_flops,
    model_size,
    prompt_work,
    sampling_work,
    sequence_work,
    train_flops,
    tree_work,
)
from rpt_lightning.policy.packing.rows import pack_rows
from rpt_lightning.policy.packing.trees import pack
from rpt_lightning.types import TrainSequence

SIZES = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def test_flops_by_hand():
    size = ModelSize(body_params=204, head_params=40, attention_width=12)
    work = Work(tokens=5, scored_tokens=3, pairs=7)
    assert forward_flops(size, work) == 2 * (204 * 5 + 40 * 3) + 4 * 12 * 7
    assert train_flops(size, work) == 6 * (204 * 5 + 40 * 3) + 12 * 12 * 7


def test_frozen_weights_take_no_gradient_of_their_own():
    """4 operations a weight and token instead of 6: the forward pass and the gradient of the inputs."""
    size = ModelSize(
        body_params=204, head_params=40, attention_width=12, frozen_body_params=200, head_is_frozen=True
    )
    work = Work(tokens=5, scored_tokens=3, pairs=7)
    assert forward_flops(size, work) == 2 * (204 * 5 + 40 * 3) + 4 * 12 * 7
    assert train_flops(size, work) == (6 * 4 + 4 * 200) * 5 + 4 * 40 * 3 + 12 * 12 * 7


@pytest.mark.parametrize("is_tied", [True, False])
def test_flops_with_an_adapter_are_those_that_torch_counts(is_tied):
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES, tie_word_embeddings=is_tied), attn_implementation="eager"
    )
    bare = model_size(model)
    add_adapter(model, Adapter(rank=2), where="")
    map_tensors(model, lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    size, length = model_size(model), 11
    # q and o 16 x 32, k and v 16 x 16, three 16 x 40 in the MLP, with A and B of rank 2.
    assert size.body_params - bare.body_params == 3 * 2 * (2 * 48 + 2 * 32 + 3 * 56)
    assert size.frozen_body_params == bare.body_params
    assert size.head_is_frozen
    assert not bare.head_is_frozen
    with FlopCounterMode(display=False) as counter:
        embedded = model.get_input_embeddings()(torch.arange(length))[None].requires_grad_()
        model(inputs_embeds=embedded).logits.sum().backward()
    work = Work(tokens=length, scored_tokens=length, pairs=length**2)
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert counter.get_total_flops() == train_flops(size, work) - 4 * vectors * length


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_flops_are_those_that_torch_counts(config_class, is_tied):
    """Compare the matrix products of a real forward and backward pass.

    Eager attention computes the whole square of pairs, including forbidden ones.
    """
    model = AutoModelForCausalLM.from_config(
        config_class(**SIZES, tie_word_embeddings=is_tied), attn_implementation="eager"
    )
    size, length = model_size(model), 11
    work = Work(tokens=length, scored_tokens=length, pairs=length**2)
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=torch.arange(length)[None]).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    # Norms and biases are not part of matrix products.
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert forward.get_total_flops() == forward_flops(size, work) - 2 * vectors * length
    assert (
        forward.get_total_flops() + backward.get_total_flops()
        == train_flops(size, work) - 6 * vectors * length
    )


def test_size_by_hand():
    untied = LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    for is_tied in (True, False):
        untied.tie_word_embeddings = is_tied
        # Per layer: q and o 8 x 8, k and v 8 x 4, three 8 x 6 in the MLP, two norms of 8. Then the last norm.
        # Heads of 4.
        body = 2 * (2 * 64 + 2 * 32 + 3 * 48 + 2 * 8) + 8
        assert model_size(AutoModelForCausalLM.from_config(untied)) == ModelSize(
            body_params=body, head_params=80, attention_width=2 * 8
        )


def test_layers_that_carry_a_state_have_no_pairs():
    from transformers import Qwen3NextConfig

    sizes = SIZES | {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            Qwen3NextConfig(**sizes, layer_types=kinds, num_experts=0, mlp_only_layers=[0, 1, 2])
        )
    assert model_size(model).attention_width == 4 * 8


def test_work_of_a_tree_and_of_its_sequences():
    """The prompt is 1 2 3, the completions 4 5 and 4 6 7. They share 4, and 5 and 7 are only targets."""
    sequences = [TrainSequence(prompt_ids=(1, 2, 3), target_ids=ids) for ids in ((4, 5), (4, 6, 7))]
    (tree,) = pack(sequences, max_tokens=100)
    assert tree_work(tree) == Work(tokens=5, scored_tokens=4, pairs=1 + 2 + 3 + 4 + 5)
    assert [sequence_work(sequence) for sequence in sequences] == [
        Work(tokens=5, scored_tokens=2, pairs=15),
        Work(tokens=6, scored_tokens=3, pairs=21),
    ]


def test_the_padding_of_rows_is_no_work():
    """Inputs of 4, 2 and 1 tokens fill rows of 4, or the first is alone and the others fill rows of 2."""
    sequences = [
        TrainSequence(prompt_ids=prompt, target_ids=ids)
        for prompt, ids in (((1, 2, 3), (4, 5)), ((1,), (2, 3)), ((6,), (7,)))
    ]
    (batch,) = pack_rows(sequences, max_tokens=12)
    assert (batch.num_tokens, batch.row_sizes) == (12, (4, 2, 1))
    assert tree_work(batch) == Work(tokens=7, scored_tokens=5, pairs=10 + 3 + 1)
    batches = list(pack_rows(sequences, max_tokens=4))
    assert [tree.num_tokens for tree in batches] == [4, 4]
    assert list(map(tree_work, batches)) == [
        Work(tokens=4, scored_tokens=2, pairs=10),
        Work(tokens=3, scored_tokens=3, pairs=3 + 1),
    ]
    # Nothing is shared here, so trees cost the same.
    assert add_works(map(tree_work, pack(sequences[1:], max_tokens=100))) == tree_work(batches[1])


def test_work_of_generation():
    assert prompt_work(4) == Work(tokens=4, pairs=10)
    assert prompt_work(4, num_cached=2) == Work(tokens=2, pairs=3 + 4)
    assert sampling_work(4, 1) == Work(scored_tokens=1)  # from the prompt's last token
    assert sampling_work(4, 3) == Work(tokens=2, scored_tokens=3, pairs=5 + 6)
    assert sampling_work(4, 0) == Work()
    # Reading and sampling together are one causal pass over all tokens except the last.
    whole = prompt_work(4) + sampling_work(4, 3)
    assert (whole.tokens, whole.pairs) == (prompt_work(6).tokens, prompt_work(6).pairs)
