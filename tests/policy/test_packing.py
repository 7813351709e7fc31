"""A packed tree gives the log-probs, entropies and gradients of the separate sequences."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rpt_lightning.policy.attention.tree_attention import NAME
from rpt_lightning.policy.logprobs import chosen_logprobs
from rpt_lightning.policy.packing.rows import pack_rows
from rpt_lightning.policy.packing.trees import pack
from rpt_lightning.types import TrainSequence

SIZES = {
    "vocab_size": 11, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


@functools.cache
def build_model(kind: str, tied: bool) -> torch.nn.Module:
    """Build a tiny model that really computes in float64.

    transformers' own RMSNorm computes in float32, whatever the dtype.
    """
    torch.manual_seed(0)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    model = model_class(
        config_class(**SIZES, tie_word_embeddings=tied, head_dim=8, attn_implementation=NAME)
    ).double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(
                    parent,
                    name,
                    torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64),
                )
    return model


def score_alone(model, sequence, temperature):
    """Compute the reference from the full logits of one unpacked sequence."""
    ids = torch.tensor([sequence.prompt_ids + sequence.target_ids])
    logits = model(input_ids=ids).logits[0, len(sequence.prompt_ids) - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids[0, len(sequence.prompt_ids) :, None])[:, 0], -(logp.exp() * logp).sum(-1)


def score_packed(model, tree, temperature):
    hidden = model.base_model(
        input_ids=tree.token_ids[None], position_ids=tree.position_ids[None], tree=tree.tree_mask()
    ).last_hidden_state[0]
    return chosen_logprobs(
        hidden[tree.parents],
        model.get_output_embeddings().weight,
        tree.targets,
        temperature=tree.temperatures(temperature),
        chunk_size=3,
    )


def flat_grad(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


# Few token values and short sequences often give shared prefixes, sequences that are prefixes of others, and
# exact repeats.
ids = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)
sequence_lists = st.lists(st.builds(TrainSequence, prompt_ids=ids, target_ids=ids), min_size=1, max_size=7)


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", False), ("qwen3", True)]
)
@settings(max_examples=15, deadline=None)
@given(sequences=sequence_lists, max_tokens=st.integers(1, 30), seed=st.integers(0, 99))
def test_packed_equals_separate(kind, tied, sequences, max_tokens, seed):
    model = build_model(kind, tied)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(2, len(s.target_ids), generator=generator, dtype=torch.float64) for s in sequences]

    model.zero_grad()
    for sequence, weight in zip(sequences, weights, strict=True):
        logprobs, entropy = score_alone(model, sequence, 0.8)
        (weight[0] @ logprobs + weight[1] @ entropy).backward()
    expected_grad = flat_grad(model)

    model.zero_grad()
    seen = []
    for tree in pack(sequences, max_tokens=max_tokens):
        logprobs, entropy = (tree.unpack(values) for values in score_packed(model, tree, 0.8))
        loss = torch.zeros((), dtype=torch.float64)
        for row, index in enumerate(tree.sequence_indices):
            length = len(sequences[index].target_ids)
            assert tree.mask[row].sum() == length
            with torch.no_grad():
                expected = score_alone(model, sequences[index], 0.8)
            torch.testing.assert_close(logprobs[row, :length], expected[0], rtol=0, atol=1e-9)
            torch.testing.assert_close(entropy[row, :length], expected[1], rtol=0, atol=1e-9)
            loss = (
                loss + weights[index][0] @ logprobs[row, :length] + weights[index][1] @ entropy[row, :length]
            )
        loss.backward()
        seen += tree.sequence_indices
    assert sorted(seen) == list(range(len(sequences)))
    torch.testing.assert_close(flat_grad(model), expected_grad, rtol=0, atol=1e-9)


temperatures = st.sampled_from([None, None, 1.0, 0.5])


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(
        st.builds(TrainSequence, prompt_ids=ids, target_ids=ids, temperature=temperatures),
        min_size=1,
        max_size=7,
    ),
    max_tokens=st.integers(1, 30),
)
def test_sequences_have_their_own_temperatures(sequences, max_tokens):
    """A token that is a target at two temperatures is scored at both. The gradients add up."""
    model = build_model("llama", tied=False)

    def expected(sequence):
        return score_alone(model, sequence, sequence.temperature or 0.75)  # exact in float32

    model.zero_grad()
    sum(expected(sequence)[0].sum() + 0.3 * expected(sequence)[1].sum() for sequence in sequences).backward()
    expected_grad = flat_grad(model)
    model.zero_grad()
    seen = []
    for tree in pack(sequences, max_tokens=max_tokens):
        assert (tree.own_temperatures is None) == all(
            sequences[index].temperature is None for index in tree.sequence_indices
        )
        scores = score_packed(model, tree, 0.75)
        sum(
            tree.unpack(values).sum() * weight for values, weight in zip(scores, (1.0, 0.3), strict=True)
        ).backward()
        for row, index in enumerate(tree.sequence_indices):
            own = tree.keep([row])
            assert own.sequence_indices == (index,)
            for values, alone in zip(scores, expected(sequences[index]), strict=True):
                torch.testing.assert_close(own.unpack(values)[0], alone, rtol=0, atol=1e-9)
        seen += tree.sequence_indices
    assert sorted(seen) == list(range(len(sequences)))
    torch.testing.assert_close(flat_grad(model), expected_grad, rtol=0, atol=1e-9)


def test_tokens_of_one_temperature_are_scored_once():
    sequences = [
        TrainSequence(prompt_ids=(5,), target_ids=(6, 7), temperature=temperature)
        for temperature in (None, 1.0, 1.0, None)
    ]
    (tree,) = pack(sequences, max_tokens=100)
    assert tree.token_ids.tolist() == [5, 6]
    assert sorted(tree.temperatures(0.5).tolist()) == [0.5, 0.5, 1.0, 1.0]
    (tree,) = pack(sequences[::3], max_tokens=100)
    assert tree.temperatures(0.5) == 0.5
    (tree,) = pack_rows(sequences[:2], max_tokens=100)
    assert tree.temperatures(0.5).tolist() == [0.5, 0.5, 1.0, 1.0]


def test_worked_example():
    """Two completions of one prompt share their first token, and a longer prompt covers the same document."""
    sequences = [
        TrainSequence(prompt_ids=(5, 6), target_ids=(1, 2)),
        TrainSequence(prompt_ids=(5, 6), target_ids=(1, 3)),
        TrainSequence(prompt_ids=(5, 6, 7), target_ids=(4,)),
    ]
    (tree,) = pack(sequences, max_tokens=100)
    assert tree.token_ids.tolist() == [5, 6, 1, 7]  # the leaves 2, 3 and 4 are only targets
    assert tree.position_ids.tolist() == [0, 1, 2, 2]
    assert tree.tree_mask().permitted().int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 0, 1],
    ]
    assert tree.targets.tolist() == [1, 2, 3, 4]
    assert tree.parents.tolist() == [1, 2, 2, 3]
    assert tree.unpack(torch.tensor([10.0, 20.0, 30.0, 40.0])).tolist() == [
        [10.0, 20.0],
        [10.0, 30.0],
        [40.0, 0.0],
    ]


def test_budget_is_kept_and_sharing_survives():
    sequences = [TrainSequence(prompt_ids=(1,) * 10, target_ids=(2, value, 9)) for value in range(20)]
    trees = list(pack(sequences, max_tokens=20))
    assert all(tree.num_tokens <= 20 for tree in trees)
    assert sum(tree.num_tokens for tree in trees) < 0.3 * sum(sequence.num_tokens for sequence in sequences)


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="0 prompt"):
        list(pack([TrainSequence(prompt_ids=(), target_ids=(1,))], max_tokens=8))


@settings(max_examples=100, deadline=None)
@given(sequences=sequence_lists, max_tokens=st.integers(1, 30))
def test_cuts_compute_the_fewest_tokens(sequences, max_tokens):
    """Try every way to cut the sorted sequences into trees within the budget.

    A single longer sequence is a tree of its own.
    """
    paths = sorted(sequence.prompt_ids + sequence.target_ids for sequence in sequences)

    def num_nodes(part):
        return len({path[:depth] for path in part for depth in range(1, len(path) + 1)})

    def fewest(start):
        if start == len(paths):
            return 0
        stops = [
            stop
            for stop in range(start + 1, len(paths) + 1)
            if stop == start + 1 or num_nodes(paths[start:stop]) <= max_tokens
        ]
        return min(num_nodes(paths[start:stop]) + fewest(stop) for stop in stops)

    trees = list(pack(sequences, max_tokens=max_tokens))
    packed = [
        [sequences[index].prompt_ids + sequences[index].target_ids for index in tree.sequence_indices]
        for tree in trees
    ]
    assert sum(num_nodes(part) for part in packed) == fewest(0)
    assert all(len(part) == 1 or num_nodes(part) <= max_tokens for part in packed)
