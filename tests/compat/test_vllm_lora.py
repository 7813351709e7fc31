"""What compat/vllm/lora.py relies on, without starting an engine."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rpt_lightning.compat.vllm import lora as compat
from rpt_lightning.compat.vllm.layers import read_adapter_tensor

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
]


def test_the_limit_is_the_smallest_that_vllm_offers() -> None:
    assert [compat.rank_limit(rank) for rank in (1, 2, 8, 9, 33, 512)] == [1, 8, 8, 16, 64, 512]
    with pytest.raises(ValueError, match=r"max_adapter_rank=513: vLLM takes adapters up to rank 512"):
        compat.rank_limit(513)


def test_requests_name_an_adapter(tmp_path: Path) -> None:
    loads, draws = (
        compat.adapter_request(tmp_path, version=3, replaces=replaces) for replaces in (True, False)
    )
    assert (loads.lora_name, loads.lora_int_id, loads.lora_path) == ("policy-3", 1, str(tmp_path))
    assert (loads.load_inplace, draws.load_inplace) == (True, False)


def test_an_adapter_that_is_not_loaded_is_an_error(tmp_path: Path) -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    assert "lora_request" in inspect.signature(LLMEngine.add_lora).parameters
    assert "lora_request" in inspect.signature(LLMEngine.add_request).parameters
    request = compat.adapter_request(tmp_path, version=0, replaces=True)
    for loaded in (True, False):
        llm = SimpleNamespace(llm_engine=SimpleNamespace(add_lora=lambda request, loaded=loaded: loaded))
        if loaded:
            compat.add_adapter(llm, request)
        else:
            with pytest.raises(RuntimeError, match="did not load the adapter"):
                compat.add_adapter(llm, request)


class Wrapped(nn.Module):
    """A fused layer of q [4], k [2] and v [2] with inputs of 3, wrapped for adapters up to rank 8."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(3, 8, bias=False)
        self.tp_size = 1
        self.lora_a_stacked = tuple(torch.zeros(1, 1, 8, 3) for _ in range(3))
        self.lora_b_stacked = tuple(torch.zeros(1, 1, size, 8) for size in (4, 2, 2))


class Model(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.qkv_proj = Wrapped()


def test_parts_of_a_fused_layer_are_read_without_their_padding() -> None:
    model = Model()
    layer = model.attention.qkv_proj
    a, b = torch.randn(2, 3), torch.randn(2, 2)
    layer.lora_a_stacked[1][0, 0, :2], layer.lora_b_stacked[1][0, 0, :, :2] = a, b
    assert compat.unwrapped(layer) is layer.base_layer
    assert compat.unwrapped(layer.base_layer) is layer.base_layer
    assert torch.equal(read_adapter_tensor(model, "attention.k_proj", "lora_A", 2), a)
    assert torch.equal(read_adapter_tensor(model, "attention.k_proj", "lora_B", 2), b)
    assert not read_adapter_tensor(model, "attention.q_proj", "lora_B", 2).any()
    # What an earlier adapter of a larger rank left there would be multiplied too.
    layer.lora_a_stacked[1][0, 0, 5, 1] = 1.0
    assert compat.read_part(layer, "lora_A", 1, 2).shape == (8, 3)
    with pytest.raises(ValueError, match="Linear has no adapter"):
        compat.read_part(layer.base_layer, "lora_A", 0, 2)
    layer.tp_size = 2
    with pytest.raises(ValueError, match="divides the adapter over devices"):
        compat.read_part(layer, "lora_A", 1, 2)


def test_vllms_own_wrapper_has_these_fields() -> None:
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    assert issubclass(BaseLinearLayerWithLoRA, BaseLayerWithLoRA)
    source = inspect.getsource(BaseLinearLayerWithLoRA)
    for field in ("self.base_layer", "self.tp_size", "self.lora_a_stacked", "self.lora_b_stacked"):
        assert field in source, f"vLLM has renamed {field}, which compat/vllm/lora.py reads"
