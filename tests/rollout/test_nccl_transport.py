"""The NCCL transport without NCCL, which needs two GPUs.

The calls must exist in the installed vLLM, and the adapter must send the right things to vLLM's sender and
the servers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
import threading

import pytest
import torch

from rpt_lightning.rollout.engine import EngineLost
from rpt_lightning.rollout.vllm_nccl_transport import FleetClient, NCCLTransport, _within, make_source

needs_vllm = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)


@pytest.mark.vllm
@needs_vllm
def test_what_is_called_exists_in_the_installed_version() -> None:
    from vllm.distributed.weight_transfer.base import ParamMeta, VLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerInitInfo,
        NCCLTrainerWeightTransferEngine,
        NCCLWeightTransferInitInfo,
    )

    NCCLTrainerInitInfo(master_address="trainer", master_port=1234, world_size=3, rank=0)
    assert "rank_offset" in {field.name for field in dataclasses.fields(NCCLWeightTransferInitInfo)}
    assert list(inspect.signature(WeightTransferTrainerFactory.trainer_init).parameters)[:1] == ["init_info"]
    assert {"client", "source"} <= inspect.signature(
        WeightTransferTrainerFactory.trainer_init
    ).parameters.keys()
    assert list(inspect.signature(NCCLTrainerWeightTransferEngine.send_weights).parameters) == ["self"]
    assert callable(NCCLTrainerWeightTransferEngine.shutdown)
    assert [field.name for field in dataclasses.fields(ParamMeta)] == ["name", "dtype", "shape"]
    for name, method in inspect.getmembers(VLLMWeightSyncClient, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(getattr(FleetClient, name)).parameters) == list(
                inspect.signature(method).parameters
            ), name


@pytest.mark.vllm
@needs_vllm
def test_the_source_declares_what_it_yields_in_the_servers_dtype() -> None:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    weights = {"a": torch.ones(2, 3), "lm_head.weight": torch.zeros(3, 4).t()}
    source = make_source()
    for _ in range(2):  # one after the other, like updates
        source.fill(
            iter(weights.items()),
            torch.bfloat16,
            {name: weight.shape for name, weight in weights.items()},
            torch.device("cpu"),
        )
        metas = (
            source.metadata
            if isinstance(inspect.getattr_static(type(source), "metadata"), property)
            else source.metadata()
        )
        # vLLM's own check of the two.
        sent = dict(NCCLTrainerWeightTransferEngine._checked_iter(source, metas))
        assert all(
            torch.equal(sent[name], weights[name].bfloat16()) and sent[name].is_contiguous()
            for name in weights
        )


class RecordingFleet:
    """A stand-in for the HTTP client that records what each server would be sent."""

    urls = ("http://a:1", "http://b:2", "http://c:3")

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, object]] = []

    def run(self, work):
        import asyncio

        return asyncio.run(work([RecordingServer(url, self.calls) for url in self.urls]))


class RecordingServer:
    def __init__(self, url: str, calls: list) -> None:
        self.url, self._calls = url, calls

    async def call(self, verb: str, path: str, body: object = None, *, limit_s: float) -> dict:
        self._calls.append((self.url, path, body))
        return {}


def test_each_server_has_its_own_ranks_in_the_group() -> None:
    fleet = RecordingFleet()
    client = FleetClient(fleet, {"http://a:1": 2, "http://c:3": 4}, timeout_s=1.0)  # server b is left out
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 7, "packed": True})
    client.finish_weight_update("5")
    assert fleet.calls == [
        (
            "http://a:1",
            "/init_weight_transfer_engine",
            {"init_info": {"rank_offset": 1, "world_size": 7, "packed": True}},
        ),
        (
            "http://c:3",
            "/init_weight_transfer_engine",
            {"init_info": {"rank_offset": 3, "world_size": 7, "packed": True}},
        ),
        ("http://a:1", "/finish_weight_update", {}),
        ("http://c:3", "/finish_weight_update", {}),
    ]


def test_a_transfer_that_hangs_or_fails_is_an_error_with_a_way_out() -> None:
    never = threading.Event()
    with pytest.raises(
        EngineLost, match=r"version 3.*not done within 0.05 s .transport.timeout_s.*--ckpt_path last"
    ):
        _within(0.05, never.wait, "sending version 3")
    with pytest.raises(EngineLost, match="KeyError: 'x'"):
        _within(5, lambda: {}["x"], "sending")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_other_transport_is_named() -> None:
    with pytest.raises(ValueError, match="needs a GPU in the trainer; use SharedFolderTransport"):
        NCCLTransport().open(RecordingFleet())
