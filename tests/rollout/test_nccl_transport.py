"""The NCCL transport without NCCL, which needs two GPUs.

The client must have the methods that the installed vLLM calls, and the adapter must send the right things to
vLLM's sender and the servers. tests/compat/test_vllm.py checks what the adapter calls.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import threading

import pytest
import torch

from rpt_lightning.rollout.engines.base import EngineLost
from rpt_lightning.rollout.sync.nccl_transport import FleetClient, NCCLTransport, _within


@pytest.mark.vllm
@pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)
def test_the_client_has_the_methods_of_the_installed_version() -> None:
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

    for name, method in inspect.getmembers(VLLMWeightSyncClient, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(getattr(FleetClient, name)).parameters) == list(
                inspect.signature(method).parameters
            ), name


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
