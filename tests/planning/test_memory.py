"""The memory's terms against the tensors that autograd really saves."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rpt_lightning.planning.memory import activation_bytes, layer_activation_bytes, logits_bytes, mask_bytes, training_memory, vllm_gpu_memory
from rpt_lightning.planning.model_shape import ModelShape, model_shape
from rpt_lightning.policy.packing import pack
from rpt_lightning.types import TrainSequence

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
}  # fmt: skip


def saved_bytes(config, *, is_mixed: bool, checkpointing: bool) -> tuple[int, int]:
    """(number of tokens, what the backbone's forward pass keeps for its backward pass besides the weights), on a packed tree."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    (tree,) = pack([TrainSequence(prompt_ids=tuple(range(40)), target_ids=(g, *range(20))) for g in range(3)], max_tokens=1000)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(sizes) for parameter in model.parameters() for sizes in (parameter.shape, parameter.shape[::-1])}
    saved, alive = {}, []

    def keep(tensor):
        is_cast_weight = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes  # counted with the weights
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not is_cast_weight:
            saved[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    mask = tree.attention_mask()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        model.base_model(input_ids=tree.token_ids[None], attention_mask=mask, position_ids=tree.position_ids[None], use_cache=False)
    ids = tree.token_ids.nbytes
    return tree.num_tokens, sum(saved.values()) - ids


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_and_masks_are_what_autograd_saves(config_class, is_mixed, checkpointing):
    torch.manual_seed(0)
    config = config_class(**SIZES, num_hidden_layers=3)
    shape = model_shape(config)
    num_tokens, saved = saved_bytes(config, is_mixed=is_mixed, checkpointing=checkpointing)
    planned = activation_bytes(shape, num_tokens, is_mixed=is_mixed, checkpointing=checkpointing)
    if checkpointing:  # the layer that is computed again comes later, and the rotary tables are kept as arguments, not as saved tensors
        planned -= num_tokens * (layer_activation_bytes(shape, is_mixed=is_mixed) + 2 * 4 * shape.head_dim)
    else:
        planned += mask_bytes(shape, num_tokens, is_mixed=is_mixed, checkpointing=False) - num_tokens**2  # the tree's own mask is not saved
    assert saved == planned


# A layer of 10 weights is easier to add up than a real one.
SHAPE = ModelShape(
    family="llama", num_layers=2, hidden_size=4, intermediate_size=8, vocab_size=10, num_heads=2, attention_width=4, kv_width=2, has_qk_norm=False,
    is_tied=False, num_params=2 * 100 + 84, layer_params=100,
)  # fmt: skip


def memory(strategy, **options):
    defaults = {
        "num_ranks": 4, "micro_batch_tokens": 16, "is_mixed": False, "checkpointing": False, "optimizer_bytes_per_param": 8, "logprob_chunk_size": 6,
    }  # fmt: skip
    return training_memory(SHAPE, strategy=strategy, **(defaults | options))


def test_what_each_strategy_holds():
    one, ddp, fsdp = (memory(strategy) for strategy in ("single", "ddp", "fsdp2"))
    assert (one.weights_bytes, one.gradients_bytes, one.optimizer_bytes, one.buckets_bytes, one.gathered_bytes) == (1136, 1136, 2272, 0, 0)
    assert (ddp.weights_bytes, ddp.buckets_bytes, ddp.gathered_bytes) == (1136, 1136, 0)
    assert (fsdp.weights_bytes, fsdp.gradients_bytes, fsdp.optimizer_bytes) == (284, 284, 568)
    assert fsdp.gathered_bytes == 4 * (2 * 84 + 4 * 100)
    assert one.activations_bytes == ddp.activations_bytes == fsdp.activations_bytes
    assert ddp.total_bytes == one.total_bytes + 1136


def test_bf16_copy_is_whole_on_every_rank():
    assert memory("fsdp2").cast_weights_bytes == 0
    assert memory("fsdp2", is_mixed=True).cast_weights_bytes == 2 * 200


def test_by_hand():
    # Per token in fp32: norms 2 x (8 x 4 + 4), inputs 2 x 16, attention 4 x 16 + 8, feed-forward 4 x 32
    assert layer_activation_bytes(SHAPE, is_mixed=False) == 72 + 32 + 72 + 128
    # In bf16: norms alike, inputs 5 x 8, attention 4 x 8 + 8, feed-forward 4 x 16
    assert layer_activation_bytes(SHAPE, is_mixed=True) == 72 + 40 + 40 + 64
    # Layers, the last norm 36, rotary 2 x 4 x 2
    assert activation_bytes(SHAPE, 10, is_mixed=False, checkpointing=False) == 10 * (2 * 304 + 36 + 16)
    assert activation_bytes(SHAPE, 10, is_mixed=False, checkpointing=True) == 10 * (2 * 16 + 304 + 36 + 16)
    assert mask_bytes(SHAPE, 10, is_mixed=True, checkpointing=False) == 100 * (1 + 2 * 2)
    assert mask_bytes(SHAPE, 10, is_mixed=False, checkpointing=True) == 100 * (1 + 4)
    assert logits_bytes(SHAPE, 6) == 6 * 10 * 8 + 40 * 4


def test_vllm_takes_its_share_whole():
    engine = vllm_gpu_memory(30e9, device_bytes=80e9, utilization=0.5)
    assert engine.total_bytes == 40e9
    assert engine.kv_cache_bytes == 40e9 - 30e9 - 2 * 2**30
