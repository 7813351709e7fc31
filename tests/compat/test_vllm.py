from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reliance import check_has, check_source, check_takes
from torch import nn

from rpt_lightning.compat.vllm import engine, layers, weight_transfer
from rpt_lightning.rollout.engines.vllm.vllm_engine import ENVIRONMENT

ROLLOUT = Path(engine.__file__).parents[2] / "rollout"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        sys.platform != "linux" or importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here",
    ),
]


@pytest.fixture(autouse=True, scope="module")
def environment() -> None:
    """Set what `VLLMEngine` sets before it imports vllm, since this process may start one later."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def vllm_source(part: str) -> str:
    """Return the text of a module or of all modules of a package, without importing it."""
    folder = Path(importlib.util.find_spec("vllm").origin).parent  # type: ignore[union-attr,arg-type]
    path = folder / part
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return "\n".join(file.read_text() for file in files)


def test_the_environment_has_the_variables_that_we_set() -> None:
    from vllm import envs

    ours = {*ENVIRONMENT, "VLLM_SERVER_DEV_MODE", "VLLM_API_KEY"}
    assert ours <= envs.environment_variables.keys(), (
        f"vLLM no longer reads {sorted(ours - envs.environment_variables.keys())}"
    )


def test_what_the_engine_offers() -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.engine.llm_engine import LLMEngine

    check_takes(LLM.collective_rpc, "method", "kwargs", used_by=engine.reload_weights)
    for name in ("apply_model", "reset_prefix_cache", "sleep", "wake_up"):
        check_has(LLM, name, used_by="rollout.vllm_engine.VLLMEngine")
    check_has(
        LLMEngine,
        *("add_request", "step", "abort_request", "has_unfinished_requests"),
        used_by="rollout.vllm_generation.generate",
    )
    check_source(LLMEngine.__init__, "self.renderer", "self.engine_core", "self.vllm_config", used_by=engine)
    check_takes(BaseRenderer.render_cmpl, "prompts", used_by=engine.rendered_prompt)
    check_has(EngineCoreClient, "shutdown", used_by=engine.shut_down)
    check_takes(
        SamplingParams, "output_kind", "stream_interval", "detokenize", used_by="rollout.vllm_generation"
    )
    assert callable(cleanup_dist_env_and_memory), f"used by {engine.free_process.__name__}"


def test_workers_load_weights_from_an_iterator() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    check_takes(GPUModelRunner.reload_weights, "weights_iterator", used_by=engine.load_in_worker)
    check_has(Worker, "reload_weights", "get_model", used_by=engine.worker_model)
    check_source(Worker.reload_weights, "self.model_runner.reload_weights(", used_by=engine.load_in_worker)


def test_configurations_say_how_a_worker_computes() -> None:
    from vllm.config import CacheConfig, ModelConfig

    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert {"dtype", "max_model_len", "logprobs_mode", "hf_config"} <= fields, (
        f"ModelConfig no longer has all that {engine.worker_facts.__name__} reads"
    )
    fields = {field.name for field in dataclasses.fields(CacheConfig)}
    assert {"block_size", "enable_prefix_caching"} <= fields, (
        f"CacheConfig no longer has all that {engine.cache_block_size.__name__} reads"
    )


def test_what_vllm_changes_in_its_process() -> None:
    from vllm.distributed.parallel_state import destroy_distributed_environment
    from vllm.model_executor.models.transformers.base import Base

    assert "torch.set_num_threads = " in vllm_source("v1/worker/cpu_worker.py"), (
        "vLLM no longer replaces torch.set_num_threads: trainer_state_kept need not restore it"
    )
    check_source(
        destroy_distributed_environment,
        "torch.distributed.destroy_process_group()",
        used_by=engine.trainers_group_kept,
    )
    check_has(Base, "_decorate_cls_for_torch_compile", used_by=engine.policys_class_kept)
    decorate = Base._decorate_cls_for_torch_compile
    with engine.policys_class_kept():
        assert Base._decorate_cls_for_torch_compile is not decorate
    assert Base._decorate_cls_for_torch_compile is decorate
    assert vllm_source("model_executor/models/transformers").count("support_torch_compile(") == 1, (
        "vLLM prepares transformers' classes for compilation in another place too"
    )


def test_state_and_group_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    set_num_threads, destroy = torch.set_num_threads, torch.distributed.destroy_process_group
    expected = torch.random.fork_rng(devices=[])
    with expected:
        drawn = torch.rand(1)
    with engine.trainer_state_kept():
        torch.set_num_threads = lambda num: None  # type: ignore[assignment]
        torch.rand(5)
    assert torch.set_num_threads is set_num_threads
    assert torch.equal(torch.rand(1), drawn)
    with engine.trainers_group_kept(True):
        torch.distributed.destroy_process_group()  # there is none, which torch's own would not accept
    assert torch.distributed.destroy_process_group is destroy


def test_the_executor_gives_its_worker_the_local_rank() -> None:
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from rpt_lightning.compat.vllm.executor import OwnDeviceExecutor

    check_has(UniProcExecutor, "_distributed_args", used_by=OwnDeviceExecutor)
    check_source(
        UniProcExecutor._init_executor,
        "distributed_init_method, rank, local_rank = self._distributed_args()",
        "local_rank=local_rank",
        used_by=OwnDeviceExecutor,
    )


def test_linear_layers_have_the_fields_that_we_read() -> None:
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    check_has(linear, "ReplicatedLinear", used_by=layers.read_tensor)
    check_has(vocab_parallel_embedding, "ParallelLMHead", used_by=layers.read_tensor)
    for name in (
        *("tp_size", "input_size", "input_size_per_partition"),
        *("output_partition_sizes", "num_kv_head_replicas"),
    ):
        check_source(linear, f"self.{name}", used_by=layers.read_tensor)
    for name in ("org_vocab_size", "embedding_dim", "tp_size"):
        check_source(
            vocab_parallel_embedding.VocabParallelEmbedding.__init__,
            f"self.{name}",
            used_by=layers.read_tensor,
        )
    assert "layer.cpu_linear(x, weight, bias)" in vllm_source("model_executor/layers/utils.py"), (
        "vLLM calls a layer's CPU kernel in another way than read_tensor"
    )


def test_models_say_which_layer_holds_a_tensor() -> None:
    from vllm.model_executor.models.gpt2 import GPT2Model
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
    from vllm.model_executor.models.utils import WeightsMapper

    check_has(WeightsMapper, "_map_name_with_shard", used_by=layers.read_tensor)
    mapped = Qwen2ForCausalLM.hf_to_vllm_mapper._map_name_with_shard("layers.0.self_attn.k_proj.weight")
    assert mapped == ("layers.0.self_attn.qkv_proj.weight", "k"), f"_map_name_with_shard returns {mapped}"
    mapped = Qwen2ForCausalLM.hf_to_vllm_mapper._map_name_with_shard("layers.0.mlp.up_proj.weight")
    assert mapped == ("layers.0.mlp.gate_up_proj.weight", 1), f"_map_name_with_shard returns {mapped}"
    assert Qwen2ForCausalLM.packed_modules_mapping["qkv_proj"] == ["q_proj", "k_proj", "v_proj"]
    check_source(GPT2Model._transpose_conv1d, '("c_attn", "c_proj", "c_fc")', used_by=layers.read_tensor)


def test_layers_of_experts_have_the_fields_that_we_read() -> None:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    check_has(FusedMoEConfig, "tp_size", "ep_size", used_by=layers.read_experts)
    fields = {field.name for field in dataclasses.fields(FusedMoEConfig)}
    assert "intermediate_size_per_partition_unpadded" in fields, "read_experts cuts the padding by it"
    check_source(MoERunner.__init__, "self.routed_experts", used_by=layers.read_experts)
    check_has(CPUUnquantizedExperts, "isa", used_by=layers.expect_experts)
    check_source(
        CPUUnquantizedExperts.process_weights_after_loading,
        '"w13_weight", cpu_prepack_moe_weight(layer.w13_weight, self.isa)',
        '"w2_weight", cpu_prepack_moe_weight(layer.w2_weight, self.isa)',
        used_by=layers.read_experts,
    )
    check_source(FusedMoEMethodBase, "self.moe_kernel", "self.experts_cls", used_by=layers.expect_experts)


def test_a_kernel_of_packed_experts_is_forgotten() -> None:
    class Kernel:
        isa = "vec"

    class Method:
        def __init__(self, experts_cls: Any) -> None:
            self.experts_cls, self.moe_kernel = experts_cls, "made"

    model = nn.ModuleList([nn.Module(), nn.Module()])
    for layer, kernel in zip(model, (Kernel, object), strict=True):
        layer.w13_weight, layer.quant_method = nn.Parameter(torch.zeros(1)), Method(kernel)
    layers.expect_experts(model)
    assert [layer.quant_method.moe_kernel for layer in model] == [None, "made"]


def test_only_embeddings_that_no_head_shares_stay_plain() -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader.reload import layerwise

    check_source(
        UnquantizedEmbeddingMethod.process_weights_after_loading,
        "dispatch_cpu_unquantized_gemm(layer, remove_weight=False)",
        used_by=layers.keep_lookups_plain,
    )
    check_source(
        UnquantizedEmbeddingMethod.embedding,
        "F.embedding(input_, layer.weight)",
        used_by=layers.keep_lookups_plain,
    )
    check_source(
        layerwise._layerwise_process,
        "quant_method.process_weights_after_loading(layer)",
        used_by=layers.keep_lookups_plain,
    )

    class VocabParallelEmbedding(nn.Module):
        def __init__(self, packed: str | None = "packed") -> None:
            super().__init__()
            self.quant_method = UnquantizedEmbeddingMethod()
            if packed:
                self.cpu_linear = packed

    class ParallelLMHead(VocabParallelEmbedding):
        pass

    def plain(*modules: nn.Module) -> list[bool]:
        layers.keep_lookups_plain(nn.ModuleList(modules))
        return ["process_weights_after_loading" in vars(module.quant_method) for module in modules]

    assert plain(VocabParallelEmbedding(), ParallelLMHead()) == [True, False]
    assert plain(VocabParallelEmbedding(packed=None), ParallelLMHead(packed=None)) == [False, False]  # a GPU
    assert plain(VocabParallelEmbedding()) == [False]  # it is also the head, as in Qwen2 with tied weights
    embedding = VocabParallelEmbedding()
    plain(embedding, ParallelLMHead())
    embedding.quant_method.process_weights_after_loading(embedding)
    inputs, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert torch.equal(embedding.cpu_linear(inputs, weight, None), inputs @ weight.t())


def test_vocabularies_are_moved_and_others_copied_into_place() -> None:
    from vllm.model_executor.model_loader.reload import layerwise
    from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

    check_source(
        layerwise._layerwise_process,
        "_copy_and_restore_kernel_tensors(layer, info)",
        used_by=layers.vocabularies_moved,
    )
    check_source(
        layerwise._copy_and_restore_kernel_tensors,
        "parameters, buffers = info.kernel_tensors",
        "param.data.copy_(getattr(layer, name))",
        "_place_kernel_tensors(layer, info)",
        used_by=layers.vocabularies_moved,
    )
    original = layerwise._copy_and_restore_kernel_tensors
    for is_vocabulary in (True, False):
        layer, old = nn.Module(), nn.Parameter(torch.zeros(3, 2), requires_grad=False)
        if is_vocabulary:
            layer.org_vocab_size = 3
        layer.weight = nn.Parameter(torch.ones(3, 2), requires_grad=False)
        new_place, old_place = layer.weight.data_ptr(), old.data_ptr()
        layer.register_buffer("scale", torch.ones(1))
        scale = torch.zeros(1)
        info = LayerReloadingInfo(restore_metadata=({}, {}), restore_device=torch.device("cpu"))
        info.kernel_tensors = ({"weight": old}, {"scale": scale})
        with layers.vocabularies_moved():
            layerwise._copy_and_restore_kernel_tensors(layer, info)
        assert layer.weight is old  # the parameter that everyone refers to
        assert torch.equal(old, torch.ones(3, 2))
        assert old.data_ptr() == (new_place if is_vocabulary else old_place)
        assert layer.scale is scale
        assert scale == 1
    assert layerwise._copy_and_restore_kernel_tensors is original


def test_the_transfer_of_weights_has_what_we_call() -> None:
    from vllm.distributed.weight_transfer.base import ParamMeta
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerInitInfo,
        NCCLTrainerWeightTransferEngine,
        NCCLWeightTransferInitInfo,
    )

    NCCLTrainerInitInfo(master_address="trainer", master_port=1234, world_size=3, rank=0)
    assert "rank_offset" in {field.name for field in dataclasses.fields(NCCLWeightTransferInitInfo)}
    trainer_init = WeightTransferTrainerFactory.trainer_init
    assert list(inspect.signature(trainer_init).parameters)[:1] == ["init_info"]
    check_takes(trainer_init, "client", "source", used_by=weight_transfer.make_sender)
    assert list(inspect.signature(NCCLTrainerWeightTransferEngine.send_weights).parameters) == ["self"]
    check_source(
        NCCLTrainerWeightTransferEngine.send_weights,
        "source = self.source",
        used_by=weight_transfer.send_weights,
    )
    assert callable(NCCLTrainerWeightTransferEngine.shutdown)
    needed = [field.name for field in dataclasses.fields(ParamMeta) if field.default is dataclasses.MISSING]
    assert needed == ["name", "dtype", "shape"], f"ParamMeta now needs {needed}"


class Client:
    """Stands for the servers. It records what they would be told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append(("init", init_info))

    def start_weight_update(self) -> None:
        self.calls.append(("start", None))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append(("update", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(("finish", weight_version))


def test_vllms_sender_sends_each_update_in_the_servers_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own sender runs, with a group in place of NCCL that keeps what is broadcast."""
    from vllm.distributed.weight_transfer import nccl_engine

    class Group:
        def __init__(self) -> None:
            self.sent: list[torch.Tensor] = []

        def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
            assert tensor.is_contiguous()
            self.sent.append(tensor.clone())

        def destroy(self) -> None:
            self.sent = []

    group = Group()
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: group)
    monkeypatch.setattr(
        nccl_engine,
        "packed_nccl_broadcast_producer",  # it needs CUDA's streams
        lambda iterator, group, src, post_iter_func, **options: [
            group.broadcast(post_iter_func(item), src=src) for item in iterator
        ],
    )
    client, device = Client(), torch.device("cpu")
    shapes = {"a": torch.Size((2, 3)), "lm_head.weight": torch.Size((4, 3))}

    def source_of(value: float, **more: torch.Tensor) -> Any:
        weights = {"a": torch.full((2, 3), value), "lm_head.weight": torch.full((3, 4), value).t(), **more}
        return weight_transfer.make_source(iter(weights.items()), torch.bfloat16, shapes, device)

    first = source_of(1.0)
    sender = weight_transfer.make_sender(
        client, first, master_address="trainer", master_port=1234, world_size=3
    )
    weight_transfer.send_weights(sender, first)
    weight_transfer.send_weights(sender, source_of(2.0))
    assert [tensor.dtype for tensor in group.sent] == [torch.bfloat16] * 4
    assert [tuple(tensor.shape) for tensor in group.sent] == [(2, 3), (4, 3)] * 2
    assert [tensor.unique().tolist() for tensor in group.sent] == [[1.0], [1.0], [2.0], [2.0]]
    assert [name for name, _ in client.calls] == ["init", *("start", "update", "finish") * 2]
    init, update = client.calls[0][1], client.calls[2][1]
    assert [init["rank_offset"], init["world_size"], init["master_port"]] == [1, 3, 1234]
    assert update == {
        "names": ["a", "lm_head.weight"],
        "dtype_names": ["bfloat16"] * 2,
        "shapes": [[2, 3], [4, 3]],
    }
    # The same from vLLM 0.32 every time. From 0.33 on, the servers remember what has not changed.
    assert client.calls[5][1] in (update, {"names": [], "dtype_names": [], "shapes": []})
    with pytest.raises(ValueError, match="more parameters than"):  # vLLM compares both channels
        weight_transfer.send_weights(sender, source_of(3.0, b=torch.ones(1)))
    sender.shutdown()
    assert group.sent == []


def test_servers_have_the_paths_that_we_request() -> None:
    requested = {
        path
        for name in ("servers/server.py", "servers/processes.py", "weight_sync/nccl_transport.py")
        for path in re.findall(r'"(/[a-z_0-9/]+)(?:\?[a-z=]+)?"', (ROLLOUT / name).read_text())
        if not path.startswith("/proc")
    }
    assert {"/inference/v1/generate", "/collective_rpc", "/weight_info", "/pause", "/health"} <= requested
    served = set(re.findall(r'\(\s*"(/[a-z_0-9/]+)"', vllm_source("entrypoints")))
    assert requested <= served, f"vLLM's server no longer has {sorted(requested - served)}"
