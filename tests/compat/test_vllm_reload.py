"""Embedding and head loaded again and again by vLLM's own layers and loaders, without an engine."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rpt_lightning.compat.vllm import engine, layers
from rpt_lightning.rollout.engines.vllm.vllm_engine import ENVIRONMENT

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        sys.platform != "linux" or importlib.util.find_spec("vllm") is None or torch.cuda.is_available(),
        reason="vLLM's build for CPUs is not installed here",
    ),
]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """Set up vLLM's groups for a single process."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    with engine.trainer_state_kept(), set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path / 'store'}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            engine.free_process()
            if torch.distributed.is_initialized():  # later tests begin without a group
                torch.distributed.destroy_process_group()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_and_head_hold_each_version(one_process: None, dtype: torch.dtype, is_tied: bool) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    model: Any = nn.Module()
    model.embed = VocabParallelEmbedding(1000, 64, params_dtype=dtype)
    model.lm_head = ParallelLMHead(1000, 64, params_dtype=dtype)
    if is_tied:
        model.lm_head = model.lm_head.tie_weights(model.embed)
    record_metadata_for_reloading(model)
    for layer in (model.embed, model.lm_head):
        layer.quant_method.process_weights_after_loading(layer)
    parameter, ids, inputs = model.embed.weight, torch.tensor([0, 5, 999]), torch.randn(3, 64, dtype=dtype)
    for _ in range(3):
        embedding = torch.randn(1000, 64)
        head = embedding if is_tied else torch.randn(1000, 64)
        layers.keep_lookups_plain(model)
        with layers.vocabularies_moved():
            initialize_layerwise_reload(model)
            for layer, weight in ((model.embed, embedding), (model.lm_head, head)):
                layer.weight.weight_loader(layer.weight, weight)
            finalize_layerwise_reload(model, None)
        assert model.embed.weight is parameter
        assert (model.lm_head.weight is parameter) == is_tied
        assert model.embed.cpu_linear is nn.functional.linear
        assert torch.equal(model.embed(ids), embedding.to(dtype)[ids])
        # What the head's kernel multiplies, and what it computes.
        held = layers.read_tensor(model, "lm_head.weight", dtype=dtype, shown_as="the head")
        assert torch.equal(held, head.to(dtype))
        outputs = model.lm_head.quant_method.apply(model.lm_head, inputs)[:, :1000]
        torch.testing.assert_close(outputs, inputs @ head.to(dtype).t(), atol=0.05, rtol=0.02)
