"""Compare the memory's terms with the tensors that autograd actually saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rpt_lightning.compat.torch import map_tensors
from rpt_lightning.planning.memory import (
    AUTOCAST,
    FP32,
    GATHERED_BF16,
    activation_bytes,
    block_mask_bytes,
    layer_activation_bytes,
    logits_bytes,
    training_memory,
    vllm_gpu_memory,
)
from rpt_lightning.planning.model_shape import ModelShape, model_shape
from rpt_lightning.planning.workload import masked_pairs
from rpt_lightning.policy.adapter import Adapter, add_adapter, bf16_names
from rpt_lightning.policy.attention.block_mask import BLOCK, tree_block_mask
from rpt_lightning.policy.attention.tree_attention import NAME
from rpt_lightning.policy.flops import ModelSize
from rpt_lightning.policy.packing.trees import pack
from rpt_lightning.types import TrainSequence

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24,
}  # fmt: skip


def small_tree():
    """Make short branches, which CPU attention computes under a mask, after a prompt with its own calls."""
    (tree,) = pack(
        [TrainSequence(prompt_ids=tuple(range(200)), target_ids=(g, *range(20))) for g in range(3)],
        max_tokens=1000,
    )
    assert {call.kind for call in tree.tree_mask().calls} == {"causal", "full", "masked"}
    return tree


def saved_bytes(config, tree, *, precision, checkpointing: bool, adapter=None) -> tuple[int, int]:
    """Measure what the backbone's forward pass keeps for its backward pass on a packed tree.

    Weights are not counted. The masks are returned as well.
    """
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).train()
    if adapter is not None:
        add_adapter(model, adapter, where="")
        map_tensors(model, lambda tensor: torch.ones_like(tensor, device="cpu") if tensor.is_meta else tensor)
        if adapter.base_dtype == "bfloat16":
            for name in bf16_names(model):
                model.get_parameter(name).data = model.get_parameter(name).to(torch.bfloat16)
    if precision == GATHERED_BF16:  # as the layers see their weights under FSDP2
        model.to(torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {
        tuple(sizes) for parameter in model.parameters() for sizes in (parameter.shape, parameter.shape[::-1])
    }
    saved, alive = {}, []

    def keep(tensor):
        is_cast_weight = (
            tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        )  # counted with the weights
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not is_cast_weight:
            saved[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is reused
        return tensor

    mask = tree.tree_mask()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision != FP32),
    ):
        model.base_model(
            input_ids=tree.token_ids[None], position_ids=tree.position_ids[None], use_cache=False, tree=mask
        )
    masks = sum(part.nbytes for parts in mask._additive.values() for part in parts.values())
    return sum(saved.values()) - tree.token_ids.nbytes, masks


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize(
    "precision", [FP32, AUTOCAST, GATHERED_BF16], ids=["fp32", "autocast", "gathered_bf16"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_and_masks_are_what_autograd_saves(config_class, precision, checkpointing):
    torch.manual_seed(0)
    config = config_class(**SIZES, num_hidden_layers=3)
    shape, tree = model_shape(config), small_tree()
    saved, masks = saved_bytes(config, tree, precision=precision, checkpointing=checkpointing)
    planned = activation_bytes(shape, tree.num_tokens, precision=precision, checkpointing=checkpointing)
    if checkpointing:  # the rotary tables are kept as arguments, not as saved tensors
        planned -= tree.num_tokens * 2 * precision.stream_bytes * shape.head_dim
    assert saved == planned
    assert masks == precision.compute_bytes * masked_pairs(tree)


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize(
    ("precision", "base_dtype"),
    [(FP32, "float32"), (AUTOCAST, "float32"), (AUTOCAST, "bfloat16")],
    ids=["fp32", "autocast", "bf16_base"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_with_an_adapter_are_what_autograd_saves(
    config_class, precision, base_dtype, checkpointing
):
    torch.manual_seed(0)
    config = config_class(**SIZES, num_hidden_layers=3)
    adapter = Adapter(rank=7, base_dtype=base_dtype)
    shape, tree = model_shape(config, adapter), small_tree()
    saved, _ = saved_bytes(config, tree, precision=precision, checkpointing=checkpointing, adapter=adapter)
    planned = activation_bytes(shape, tree.num_tokens, precision=precision, checkpointing=checkpointing)
    if checkpointing:
        planned -= tree.num_tokens * 2 * precision.stream_bytes * shape.head_dim
    # Frozen weights need no gradient, so the first layer keeps a little less than the others.
    assert 0.97 * planned <= saved <= planned


def test_what_an_adapter_holds():
    """Of 284 weights 200 are held in bf16, and an adapter of 20 is trained."""
    shape = replace(SHAPE, adapter_rank=1, adapter_targets=2, adapter_params=20, bf16_params=200)
    options = {
        "num_ranks": 4, "micro_batch_tokens": 16, "masked_pairs": 0, "precision": AUTOCAST,
        "checkpointing": False, "optimizer_bytes_per_param": 8, "logprob_chunk_size": 6, "on_gpu": False,
    }  # fmt: skip
    one, ddp, fsdp = (
        training_memory(shape, strategy=strategy, **options) for strategy in ("single", "ddp", "fsdp2")
    )
    held = 4 * (284 - 200 + 20) + 2 * 200
    assert (one.weights_bytes, one.gradients_bytes, one.optimizer_bytes) == (held, 80, 160)
    assert (one.buckets_bytes, ddp.buckets_bytes) == (0, 80)
    assert (fsdp.weights_bytes, fsdp.gradients_bytes, fsdp.optimizer_bytes) == (held / 4, 20, 40)
    # The frozen matrices are not cast. A and B are, 10 weights of each of two layers.
    assert one.cast_weights_bytes == 2 * 20
    fp32 = training_memory(replace(shape, bf16_params=0), strategy="single", **options)
    assert fp32.cast_weights_bytes == 2 * 2 * (100 + 10)
    # 84 weights outside the layers and two layers of 100, in bf16, and the gradients of one layer's adapter.
    assert fsdp.gathered_bytes == 2 * (84 + 200) + 3 * 4 * 10


# A layer of 10 weights is easier to add up than a real one.
SHAPE = ModelShape(
    family="llama", num_layers=2, hidden_size=4, intermediate_size=8, vocab_size=10, num_heads=2,
    attention_width=4, kv_width=2, has_qk_norm=False,
    is_tied=False, num_params=2 * 100 + 84, layer_params=100,
    size=ModelSize(body_params=204, head_params=40, attention_width=8),
)  # fmt: skip


def memory(strategy, **options):
    defaults = {
        "num_ranks": 4, "micro_batch_tokens": 16, "masked_pairs": 0, "precision": FP32,
        "checkpointing": False, "optimizer_bytes_per_param": 8,
        "logprob_chunk_size": 6, "on_gpu": False,
    }  # fmt: skip
    return training_memory(SHAPE, strategy=strategy, **(defaults | options))


def test_what_each_strategy_holds():
    one, ddp, fsdp = (memory(strategy) for strategy in ("single", "ddp", "fsdp2"))
    assert (
        one.weights_bytes,
        one.gradients_bytes,
        one.optimizer_bytes,
        one.buckets_bytes,
        one.gathered_bytes,
    ) == (1136, 1136, 2272, 0, 0)
    assert (ddp.weights_bytes, ddp.buckets_bytes, ddp.gathered_bytes) == (1136, 1136, 0)
    assert (fsdp.weights_bytes, fsdp.gradients_bytes, fsdp.optimizer_bytes) == (284, 284, 568)
    assert fsdp.gathered_bytes == 4 * (2 * 40 + 4 * 100)
    assert one.activations_bytes == ddp.activations_bytes == fsdp.activations_bytes
    assert ddp.total_bytes == one.total_bytes + 1136


def test_offloaded_moments_are_on_the_device_for_the_step_alone():
    """After the pass: 2,272 bytes of moments, and 1,136 for square roots unless AdamW is fused."""
    held, offloaded = (memory("single", on_gpu=True, offload_moments=given) for given in (False, True))
    assert (held.optimizer_bytes, offloaded.optimizer_bytes) == (2272, 0)
    assert held.lasting_bytes - offloaded.lasting_bytes == 2272
    for tokens in (1, 16):  # with 1 token the step is the fullest moment
        for is_fused, roots in ((True, 0), (False, 1136)):
            part = memory(
                "single",
                on_gpu=True,
                offload_moments=True,
                is_fused=is_fused,
                micro_batch_tokens=tokens,
            )
            at_step = part.weights_bytes + part.gradients_bytes + 2272 + roots
            assert part.total_bytes >= at_step
            assert (part.total_bytes == at_step) is (part.activations_bytes + part.masks_bytes < 2272 + roots)


def test_where_bf16_copies_of_the_weights_are():
    """Autocast's copies last until the backward pass: those of all layers, or of the recomputed one.

    FSDP2 in bf16 needs none.
    """
    whole = memory("fsdp2", precision=AUTOCAST)
    assert memory("fsdp2", precision=AUTOCAST, checkpointing=True).cast_weights_bytes == 2 * 100
    gathered = memory("fsdp2", precision=GATHERED_BF16)
    assert (whole.cast_weights_bytes, whole.gathered_bytes) == (2 * 200, 4 * (2 * 40 + 4 * 100))
    assert (gathered.cast_weights_bytes, gathered.gathered_bytes) == (0, 2 * (2 * 40 + 3 * 100) + 4 * 100)
    assert gathered.weights_bytes == whole.weights_bytes == 284


def test_activations_by_hand():
    # Per token in fp32: norms 2 x (8 x 4 + 4), inputs 2 x 16, attention 2 x 16 + 2 x 8 + 8,
    # feed-forward 4 x 32
    assert layer_activation_bytes(SHAPE, precision=FP32) == 72 + 32 + 56 + 128
    # Under autocast: the same norms, inputs 5 x 8, attention 2 x 8 + 2 x 4 + 8, feed-forward 4 x 16
    assert layer_activation_bytes(SHAPE, precision=AUTOCAST) == 72 + 40 + 32 + 64
    # With weights in bf16: norms 2 x (6 x 4 + 4), inputs 2 x 8
    assert layer_activation_bytes(SHAPE, precision=GATHERED_BF16) == 56 + 16 + 32 + 64
    # Layers, the last norm 36, rotary 2 x 4 x 2
    assert activation_bytes(SHAPE, 10, precision=FP32, checkpointing=False) == 10 * (2 * 288 + 36 + 16)
    assert activation_bytes(SHAPE, 10, precision=FP32, checkpointing=True) == 10 * (2 * 16 + 36 + 16)
    assert memory("single").activations_bytes == 16 * (2 * 288 + 36 + 16 + 16)
    assert memory("single", masked_pairs=9, precision=AUTOCAST).masks_bytes == 18


def test_work_by_hand():
    # A tile of 6 tokens by 10 words, twice in fp32
    assert logits_bytes(SHAPE, 6, vocab_chunk=10, precision=FP32) == 480
    # ... and 10 x 4 weights in bf16, and the same again to add
    assert logits_bytes(SHAPE, 6, vocab_chunk=10, precision=AUTOCAST) == 480 + 40 * (2 + 2)
    # ... the weights are already bf16, and their gradient is summed in fp32
    assert logits_bytes(SHAPE, 6, vocab_chunk=10, precision=GATHERED_BF16) == 480 + 40 * (4 + 2)
    # The head: a tile, the hidden states' gradient twice, its own gradient. A layer: 16 x (3 x 8 + 2 x 4) x 4
    assert memory("single").work_bytes == max(480 + 2 * 4 * 16 * 4 + 4 * 40, 16 * 32 * 4)
    # ... and the recomputed layer
    assert memory("single", checkpointing=True).work_bytes == 16 * (288 + 32 * 4)
    # AdamW's square roots of all weights, once the single token's activations are gone
    few = memory("single", micro_batch_tokens=1, on_gpu=True)
    assert few.activations_bytes + few.masks_bytes + few.work_bytes == 1136
    assert (
        memory("single", micro_batch_tokens=1, on_gpu=True, optimizer_bytes_per_param=0).work_bytes
        == 2 * 4 * 10 + 2 * 4 * 4 + 4 * 40
    )


def test_block_mask_is_as_large_as_the_real_one():
    ends = torch.full((4 * BLOCK,), 4 * BLOCK)
    mask = tree_block_mask(ends, torch.arange(4 * BLOCK))
    parts = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    parts += (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)
    assert block_mask_bytes(4 * BLOCK) == sum(part.nbytes for part in parts)


def test_vllm_takes_its_share_whole():
    engine = vllm_gpu_memory(30e9, device_bytes=80e9, utilization=0.5)
    assert engine.total_bytes == 40e9
    assert engine.kv_cache_bytes == 40e9 - 30e9 - 2 * 2**30
