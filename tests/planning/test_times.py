"""Seconds and bytes of a step, checked with numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rpt_lightning.planning.devices import DEVICES, Device
from rpt_lightning.planning.host_memory import (
    offloaded_bytes,
    offloaded_moment_bytes,
    pinned_shard_bytes,
)
from rpt_lightning.planning.model_shape import ModelShape
from rpt_lightning.planning.settings import Rates, RunSettings
from rpt_lightning.planning.times import busiest_completions, step_times, step_traffic
from rpt_lightning.planning.workload import step_tokens
from rpt_lightning.policy.flops import ModelSize

SHAPE = ModelShape(
    family="llama", num_layers=2, hidden_size=4, intermediate_size=8, vocab_size=10, num_heads=2,
    attention_width=4, kv_width=2, has_qk_norm=False,
    is_tied=False, num_params=2 * 100 + 84, layer_params=100,
    size=ModelSize(body_params=204, head_params=40, attention_width=8),
)  # fmt: skip
DEVICE = Device(
    name="slow", memory_bytes=1e6, peak_flops=1000.0, bandwidth_bytes_per_s=100.0, link_bytes_per_s=50.0,
    host_link_bytes_per_s=20.0,
)  # fmt: skip
RATES = Rates(mfu=0.5, bandwidth_frac=0.5, storage_bytes_per_s=10.0)  # 500 operations and 50 bytes per second
SETTINGS = RunSettings(
    tasks_per_step=4, positions_per_document=1, group_size=2, max_prompt_tokens=10, max_context_tokens=None,
    max_completion_tokens=30, micro_batch_tokens=100,
    optimizer_steps_per_batch=1, max_steps=10, optimizer_bytes_per_param=8, logprob_chunk_size=8,
    is_fused=True,
    is_mixed=True, gathers_bf16=True, cpu_offload=False,
    checkpointing=False, strategy="fsdp2", num_devices=2, num_servers=0, transport="folder", on_gpu=False,
    engine="vllm", engine_dtype_bytes=2,
    gpu_memory_utilization=0.5, syncs_adapter=False, engine_sleeps=False, kv_cache_bytes=0, max_num_seqs=100,
    max_batch_tokens=0, shares_prefill=True,
)  # fmt: skip
# Four prompts of 3 tokens that share nothing, with two completions of 5 tokens each.
PROMPTS = [(1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)]
TOKENS = step_tokens(
    PROMPTS, group_size=2, completion_tokens=5, live_frac=1.0, micro_batch_tokens=100, num_ranks=2
)
# A sampled token takes at most 2 x (204 + 40) operations, and its pairs.
# In all: 8 x (4 tokens fed, 5 scored, 4 + 5 + 6 + 7 pairs).
SAMPLING_FLOPS = 8 * (2 * (204 * 4 + 40 * 5) + 4 * 8 * 22)
# A rank trains 2 groups: 3 + 2 x 4 tokens, 10 scored, 6 + 2 x 22 pairs each.
TRAIN_FLOPS = 2 * 3 * (2 * (204 * 11 + 40 * 10) + 4 * 8 * 50)


def times(concurrent=4.0, **changes):
    return step_times(replace(SETTINGS, **changes), SHAPE, DEVICE, RATES, TOKENS, concurrent)


def test_generation_in_the_trainer():
    step = times()
    # Each of two ranks reads 2 of 4 prompts: 3 tokens, 6 pairs.
    assert step.prefill_s == pytest.approx(2 * (2 * 204 * 3 + 4 * 8 * 6) / 500)
    # A pass reads 488 bytes of weights and 4 x 5.5 cached tokens of 2 x 2 x 2 x 2 bytes. 4 completions, all
    # at once, take 5 passes.
    read_s, compute_s = (488 + 4 * 5.5 * 16) / 50, 4 * SAMPLING_FLOPS / 40 / 500
    assert read_s > compute_s
    assert step.decode_s == pytest.approx(5 * read_s)
    assert step.decode_cache_frac == pytest.approx(352 / 840)
    assert step.longest_decode_s == pytest.approx(30 * 488 / 50)
    # Two at a time take twice as many passes.
    assert times(concurrent=2.0).decode_s == pytest.approx(10 * (488 + 2 * 5.5 * 16) / 50)


def test_training_and_sync():
    step = times()
    assert step.train_compute_s == pytest.approx(TRAIN_FLOPS / 500)
    assert (
        times(checkpointing=True).train_compute_s == step.train_compute_s
    )  # recomputation does not count, because a smaller mfu accounts for it
    # 2 forward, 4 backward, 2 for the log-probs before the update
    assert times(optimizer_steps_per_batch=2).train_compute_s == pytest.approx(8 / 6 * TRAIN_FLOPS / 500)
    # One micro-batch: half of the weights twice in bf16, half of the gradients in fp32.
    traffic = step_traffic(SETTINGS, SHAPE, TOKENS, RATES)
    assert TOKENS.micro_batches == 1
    assert (traffic.train_bytes, traffic.gather_bytes, traffic.server_bytes) == (
        142 * (2 * 2 + 4),
        (142 + 42) * 4,
        0,
    )
    assert step.train_network_s == pytest.approx(142 * 8 / 50)
    # Gathered in fp32 (embedding and head, 84 parameters, once more for the check), then read in fp32 and
    # written in bf16.
    assert step.sync_s == pytest.approx((142 + 42) * 4 / 50 + 284 * 6 / 50)
    assert step.offload_s == 0
    assert step.step_s == pytest.approx(
        step.prefill_s + step.decode_s + max(step.train_compute_s, step.train_network_s) + step.sync_s
    )


def test_generation_on_servers():
    on_three = replace(SETTINGS, engine="servers", num_servers=3)
    assert busiest_completions(on_three, TOKENS) == 4  # two of four tasks
    assert busiest_completions(replace(on_three, num_servers=9), TOKENS) == 2
    step = times(engine="servers", num_servers=4, transport="nccl", concurrent=2.0)
    assert step.decode_s == pytest.approx(5 * (488 + 2 * 5.5 * 16) / 50)
    assert step.train_compute_s == times().train_compute_s
    # Besides the trainer's work: 568 bytes at 50 GB/s, read and written by the server.
    assert step.sync_s == pytest.approx(times().sync_s + 568 / 50e9 + 284 * 4 / 50)
    # Through a folder at 10 bytes per second: written once, and read by one node or by two. On the trainer's
    # host and on the server's, the weights cross a link of 20 bytes per second and a digest is computed.
    hosts = 2 * 568 * (1 / 20 + 1 / 10e9)
    for num_servers, passes in ((4, 2), (9, 3)):
        folder = times(engine="servers", num_servers=num_servers, concurrent=2.0)
        assert folder.sync_s == pytest.approx(times().sync_s + passes * 568 / 10 + 284 * 4 / 50 + hosts)
        # 3 % of the weights change, which takes 3 bytes for 2 of each. Every tenth version, all of them
        # are written besides.
        delta = times(engine="servers", num_servers=num_servers, concurrent=2.0, full_every=10)
        assert delta.sync_s == pytest.approx(
            times().sync_s + passes * 0.045 * 568 / 10 + 56.8 / 10 + 284 * 4 / 50 + hosts
        )
    assert step.overlapped_s == pytest.approx(max(step.generation_s, step.train_s) + step.sync_s)


@pytest.mark.parametrize(
    ("changed_frac", "dtype_bytes", "full_every", "received"),
    [
        (0.03, 2, 10, 0.045),
        (0.03, 4, 10, 0.0375),
        (0.33, 2, 10, 0.495),
        (0.34, 2, 10, 1.0),  # patches of half of the weights are not sent
        (0.03, 2, 1, 1.0),
    ],
)
def test_what_a_server_receives_through_a_folder(
    changed_frac: float, dtype_bytes: int, full_every: int, received: float
) -> None:
    settings = replace(SETTINGS, num_servers=1, engine_dtype_bytes=dtype_bytes, full_every=full_every)
    rates = replace(RATES, changed_frac=changed_frac)
    traffic = step_traffic(settings, SHAPE, TOKENS, rates)
    assert traffic.server_bytes == pytest.approx(received * dtype_bytes * 284)
    by_nccl = replace(settings, transport="nccl")
    assert step_traffic(by_nccl, SHAPE, TOKENS, rates).server_bytes == dtype_bytes * 284


def test_what_offload_costs():
    step = times(cpu_offload=True)
    shard = 4 * 142
    # One micro-batch: to the device twice, gradients back. AdamW reads four numbers and writes three.
    assert step.offload_s == pytest.approx(3 * shard / 20 + 7 * shard / 77e9)
    unfused = times(cpu_offload=True, is_fused=False)
    assert unfused.offload_s - step.offload_s == pytest.approx(7 * 7 * shard / 77e9, abs=1e-12)
    assert step.train_s == pytest.approx(max(step.train_compute_s, step.train_network_s) + step.offload_s)
    assert step.sync_s == pytest.approx(
        times().sync_s + (142 + 42) * 4 / 20
    )  # to the device, to be gathered there


def test_gradients_after_the_first_micro_batch_go_to_new_memory():
    tokens = replace(TOKENS, micro_batches=5)
    settings = replace(SETTINGS, cpu_offload=True)
    step = step_times(settings, SHAPE, replace(DEVICE, host_link_bytes_per_s=64e9), RATES, tokens, 4.0)
    shard = 4 * 142
    # Two numbers are read and one is written for each addition.
    seconds = (2 * 5 + 1) * shard / 64e9 + 4 * (shard / 8e9 + 3 * shard / 77e9) + 7 * shard / 77e9
    assert step.offload_s == pytest.approx(seconds)


def test_offloaded_moments_move_once_a_step():
    tokens = replace(TOKENS, micro_batches=5)
    settings = replace(SETTINGS, offload_moments=True, on_gpu=True)
    for strategy, weights in (("fsdp2", 142), ("ddp", 284)):
        step = step_times(replace(settings, strategy=strategy), SHAPE, DEVICE, RATES, tokens, 4.0)
        assert step.offload_s == pytest.approx(2 * 8 * weights / 20)
    assert offloaded_moment_bytes(SHAPE, num_shards=2, optimizer_bytes_per_param=8) == 2 * (2 * 288 + 256)


def test_ddp_sends_gradients_once_a_step():
    one, five = (
        step_traffic(replace(SETTINGS, strategy="ddp"), SHAPE, replace(TOKENS, micro_batches=number))
        for number in (1, 5)
    )
    assert one.train_bytes == five.train_bytes == 2 * 4 * 284 / 2


def test_pinned_memory_comes_in_powers_of_two():
    # Rows over two ranks: q and o 2 x 4, k and v 1 x 4, gate and up 4 x 4, down 2 x 8 numbers; 5 x 4 outside.
    assert pinned_shard_bytes(SHAPE, num_ranks=2) == 2 * (2 * 32 + 2 * 16 + 3 * 64) + 2 * 128
    assert pinned_shard_bytes(replace(SHAPE, is_tied=True), num_ranks=2) == 2 * 288 + 128
    offloaded = offloaded_bytes(SHAPE, num_ranks=2, optimizer_bytes_per_param=8)
    assert offloaded == 2 * (2 * 288 + 256) + 8 * 142


def test_a_node_sends_at_the_speed_of_all_its_adapters():
    h100 = DEVICES["h100"]
    assert (h100.network_bytes_per_s(8), h100.network_bytes_per_s(9)) == (450e9, 400e9)
    assert (h100.peak_flops, h100.bandwidth_bytes_per_s, h100.host_link_bytes_per_s) == (
        989e12,
        3.35e12,
        64e9,
    )


def test_an_adapter_sends_less():
    """Of 284 weights 20 are an adapter's, and 200 of the frozen ones are held in bf16."""
    shape = replace(SHAPE, adapter_rank=1, adapter_targets=2, adapter_params=20, bf16_params=200)
    held = 4 * (284 - 200 + 20) + 2 * 200
    assert shape.held_bytes == held
    traffic = step_traffic(SETTINGS, shape, TOKENS)
    assert traffic.train_bytes == (2 * held + 4 * 20) / 2 * TOKENS.micro_batches
    ddp = step_traffic(replace(SETTINGS, strategy="ddp"), shape, TOKENS)
    assert ddp.train_bytes == 2 * 4 * 20 / 2 * TOKENS.micro_batches
    alone, merged = (
        step_times(
            replace(SETTINGS, strategy="single", syncs_adapter=alone), shape, DEVICE, RATES, TOKENS, 4.0
        ).sync_s
        for alone in (True, False)
    )
    # fp32 is read and bf16 written, at 50 bytes a second.
    assert alone == pytest.approx(20 * 6 / 50)
    assert merged == pytest.approx(284 * 6 / 50)
