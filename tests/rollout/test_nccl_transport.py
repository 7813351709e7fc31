"""The NCCL transport without NCCL, which needs two GPUs.

The client must have the methods that the installed vLLM calls, and the adapter must send the right things to
vLLM's sender and the servers. tests/compat/test_vllm.py checks what the adapter calls.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import threading
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import pytest
import torch

from rpt_lightning.rollout.engines.base import EngineLost
from rpt_lightning.rollout.servers.server_engine import VLLMServerEngine
from rpt_lightning.rollout.weight_sync import nccl_transport as vllm_nccl_transport
from rpt_lightning.rollout.weight_sync.nccl_transport import FleetClient, NCCLTransport, _within


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
    never, given_up = threading.Event(), []

    def give_up() -> None:
        given_up.append(True)
        never.set()

    with pytest.raises(
        EngineLost,
        match=r"version 3.*not done within 0.05 s .transport.timeout_s.*anew .`rpt serve`.*--ckpt_path last",
    ):
        _within(0.05, never.wait, "sending version 3", give_up=give_up)
    with pytest.raises(EngineLost, match="KeyError: 'x'"):
        _within(5, lambda: {}["x"], "sending", give_up=lambda: given_up.append({}["another"]))
    assert given_up == [True]


class HangingSender:
    """Stands for vLLM's sender. It reads the first weight and then waits for a server that died.

    Args:
        ends_when_aborted: Whether ``shutdown`` lets it go on.
    """

    def __init__(self, *, ends_when_aborted: bool) -> None:
        self.ends_when_aborted, self.aborted, self.is_waiting = ends_when_aborted, threading.Event(), False

    def send(self, source: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _ in source:
            pass

    def wait(self) -> None:
        self.is_waiting = True
        self.aborted.wait(20)

    def shutdown(self) -> None:
        if self.ends_when_aborted:
            self.aborted.set()


@pytest.mark.parametrize("ends_when_aborted", [True, False], ids=["aborted", "not aborted"])
def test_a_hang_inside_the_weights_is_not_masked(
    monkeypatch: pytest.MonkeyPatch, ends_when_aborted: bool
) -> None:
    """Reading the weights to the end would raise ValueError while another thread is inside of them."""
    sender = HangingSender(ends_when_aborted=ends_when_aborted)
    monkeypatch.setattr(vllm_nccl_transport, "make_source", lambda weights, *settings: weights)
    monkeypatch.setattr(vllm_nccl_transport, "send_weights", lambda sender, source: sender.send(source))
    monkeypatch.setattr(vllm_nccl_transport, "_ABORT_S", 0.2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    transport = NCCLTransport(timeout_s=0.2)
    transport._sender, transport._members = sender, {"http://a:1": ("start", 1)}
    transport._fleet = SimpleNamespace(run=lambda work: transport._members or {"http://a:1": ("start", 1)})
    engine = VLLMServerEngine(["http://a:1"], transport)
    engine._fleet = SimpleNamespace(run=lambda work: [])
    passed = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("a", "b", "c"):
            passed.append(name)
            yield name, torch.zeros(1)
            if name == "a":
                sender.wait()

    with pytest.raises(EngineLost, match=r"not done within 0.2 s .*start them anew .`rpt serve`.") as caught:
        engine._deliver(weights(), 3)
    assert sender.is_waiting
    assert caught.value.__context__ is None
    assert transport._sender is None  # so closing the engine does not touch the group again
    # After an abort all weights were gathered, so that other ranks can go on.
    assert passed == (["a", "b", "c"] if ends_when_aborted else ["a"])
    sender.aborted.set()


def test_the_first_error_wins_over_one_in_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(weights: object, **settings: object) -> None:
        raise EngineLost("none of the 2 servers could be used")

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        raise RuntimeError("the gather failed too")
        yield

    transport = NCCLTransport()
    monkeypatch.setattr(transport, "publish", publish)
    engine = VLLMServerEngine(["http://a:1"], transport)
    engine._fleet = SimpleNamespace(run=lambda work: [])
    with pytest.raises(EngineLost, match="none of the 2"):
        engine._deliver(broken(), 3)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_vllm_is_looked_for_when_the_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    NCCLTransport().open(RecordingFleet())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs vLLM in the trainer too; install rpt-lightning.vllm."):
        NCCLTransport().open(RecordingFleet())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_other_transport_is_named() -> None:
    with pytest.raises(ValueError, match="needs a GPU in the trainer; use SharedFolderTransport"):
        NCCLTransport().open(RecordingFleet())
