from __future__ import annotations

import importlib
import io
import pathlib
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from rpt_lightning.compat import torch as compat


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_kernels_compute_attention_its_log_sum_exp_and_its_gradients(is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    scores = 0.3 * query @ key.transpose(-1, -2)
    if is_causal:
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = scores.softmax(-1) @ value
    grad = torch.randn(1, 2, 5, 8, generator=generator, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, (query, key, value), grad)
    with torch.no_grad():
        output, logsumexp = compat.cpu_flash_attention(
            query, key, value, is_causal=is_causal, mask=None, scale=0.3
        )
        grads = compat.cpu_flash_attention_backward(
            grad, query, key, value, output, logsumexp, is_causal=is_causal, mask=None, scale=0.3
        )
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logsumexp, scores.logsumexp(-1))
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_mask_is_added_to_the_scores() -> None:
    query = key = value = torch.eye(3)[None, None]
    mask = torch.tensor([[0.0, -torch.inf, -torch.inf]] * 3)[None, None]
    output, _ = compat.cpu_flash_attention(query, key, value, is_causal=False, mask=mask, scale=1.0)
    assert torch.equal(output, value[:, :, :1].expand(1, 1, 3, 3))


def test_the_cpu_is_described() -> None:
    assert isinstance(compat.has_bf16_instructions(), bool)
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform == "linux" and "avx" in cpuinfo.read_text():
        flags = set(cpuinfo.read_text().split())
        assert compat.has_bf16_instructions() == bool(flags & {"avx512_bf16", "amx_bf16"})


def test_the_limit_of_compilations_is_raised_and_never_lowered() -> None:
    config: Any = torch._dynamo.config
    with config.patch(recompile_limit=8):
        compat.allow_recompilations(16)
        compat.allow_recompilations(2)
        assert config.recompile_limit == 16


def test_every_parameter_and_buffer_is_replaced() -> None:
    module = nn.Sequential(nn.Linear(2, 3, device="meta"), nn.BatchNorm1d(3))
    buffer = module[1].running_var.clone()
    compat.map_tensors(module, lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t)
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())
    assert torch.equal(module[1].running_var, buffer), "_apply changed a tensor that the function kept"


def test_schedules_mark_the_groups_whose_momentum_they_move() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    CosineAnnealingLR(optimizer, 10)
    assert compat.scheduled_settings(optimizer.param_groups[0]) == {"lr"}
    OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    assert compat.scheduled_settings(optimizer.param_groups[0]) == {"lr", "momentum", "betas"}, (
        "OneCycleLR leaves no base_momentum any more"
    )


def test_a_lost_connection_is_known_by_its_class_or_by_gloos_text() -> None:
    assert compat.is_lost_connection(dist.DistNetworkError("x"))
    assert compat.is_lost_connection(
        RuntimeError("[.../third_party/gloo/gloo/transport/tcp/pair.cc:547] closed")
    )
    assert not compat.is_lost_connection(RuntimeError("out of memory"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    state = {"state_dict": {"policy.weight": torch.arange(6.0).view(2, 3)}, "lr": 0.1, "steps": [1, 2]}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def test_the_index_of_shards_names_only_what_we_allow(shards: Path) -> None:
    named: set[tuple[str, str]] = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add((module, name))
            return super().find_class(module, name)

    assert (shards / compat.SHARD_INDEX).is_file(), "torch names the index of a folder of shards differently"
    index = Recorder(io.BytesIO((shards / compat.SHARD_INDEX).read_bytes())).load()
    dtypes = {("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
    assert named <= compat.SHARD_INDEX_NAMES | dtypes, (
        f"an index now names {sorted(named - compat.SHARD_INDEX_NAMES - dtypes)}"
    )
    for entry in index.storage_data.values():
        assert (shards / entry.relative_path).stat().st_size >= entry.offset + entry.length
        assert not entry.transform_descriptors


def test_the_names_that_an_index_may_hold_exist() -> None:
    for module, name in sorted(compat.SHARD_INDEX_NAMES):
        if module == "pathlib._local" and not hasattr(pathlib, "_local"):  # before Python 3.13
            continue
        assert hasattr(importlib.import_module(module), name), f"{module} no longer has {name}"


def test_stored_tensors_are_described_in_both_formats(shards: Path) -> None:
    (tensor,) = compat.stored_tensors(FileSystemReader(shards)).items()
    assert tensor[0] == "state_dict.policy.weight", "nested names are joined in another way"
    assert (tensor[1].size, tensor[1].properties.dtype) == (torch.Size([2, 3]), torch.float32)
    save_file({"weight": torch.zeros(4, 5, dtype=torch.bfloat16)}, shards / "model.safetensors")
    entries = compat.stored_tensors(HuggingFaceStorageReader(str(shards)))
    assert {name: entry.size for name, entry in entries.items()} == {"weight": torch.Size([4, 5])}
