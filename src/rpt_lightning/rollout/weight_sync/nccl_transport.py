"""Weight sync over NCCL, through vLLM's own transfer (``vllm.distributed.weight_transfer``).

One broadcast goes from the trainer's first GPU to all GPUs of all servers. vLLM
changes this part from release to release, so compat/vllm/weight_transfer.py makes the calls.
tests/compat/test_vllm.py checks them against the installed version, and test_vllm_wheels.py against every
version that pyproject.toml allows. It has not been tried with real GPUs, since we had no machine with one for
the trainer and one for a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rpt_lightning.compat.vllm.weight_transfer import make_sender, make_source, send_weights
from rpt_lightning.rollout.engines.base import EngineLost
from rpt_lightning.rollout.servers.server import Fleet, Server, ServerLost
from rpt_lightning.rollout.weight_sync.transport import WeightTransport

# After a failed update, wait this long for the thread that sent it to let go of the weights, in seconds.
_ABORT_S = 60.0


class NCCLTransport(WeightTransport):
    """A transport that broadcasts weights from the trainer's GPU.

    Only the trainer has the weights, so a server that lost them receives them at the next weight sync.

    Args:
        master_address: Address at which the servers reach the trainer. null means this machine's name.
        timeout_s: Time limit for one weight sync, in seconds. NCCL itself would wait forever for a server
            that died during it.
    """

    def __init__(self, master_address: str | None = None, timeout_s: float = 600.0) -> None:
        self.master_address = master_address
        self.timeout_s = timeout_s
        self._fleet: Fleet | None = None
        self._members: dict[str, tuple[str, int]] = {}  # url -> id of the server's start, number of GPUs
        self._received: set[str] = set()
        self._sender: Any = None

    def open(self, fleet: Fleet) -> None:
        if not torch.cuda.is_available():
            raise ValueError(
                "rollout.engine.transport NCCLTransport needs a GPU in the trainer; use SharedFolderTransport"
            )
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "rollout.engine.transport NCCLTransport needs vLLM in the trainer too; install "
                "rpt-lightning[vllm], or use SharedFolderTransport"
            )
        self._fleet = fleet
        # If the installed vLLM has another interface, this fails before the first step.
        make_source((), torch.bfloat16, {}, torch.device("cpu"))

    def publish(
        self,
        weights: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        dtype: torch.dtype,
        shapes: Mapping[str, torch.Size],
    ) -> None:
        assert self._fleet is not None
        self._received = set()
        members = self._fleet.run(_hold_all)
        if not members:  # servers that come later are told to wait for the next update
            return
        device = torch.device("cuda", torch.cuda.current_device())
        source = make_source(weights, dtype, shapes, device)

        def send() -> None:
            torch.cuda.set_device(device)  # the current device is a property of the thread
            if members != self._members:
                self._regroup(members, source)
            send_weights(self._sender, source)

        _within(
            self.timeout_s,
            send,
            f"sending the weights of version {version} to {', '.join(members)}",
            give_up=self.close,
        )
        self._received = set(members)

    def follow(self, version: int) -> None:
        """Do nothing.

        Only the first rank knows which servers got the weights. To the others, a server without them is lost.
        """

    async def load(self, server: Server) -> None:
        if server.url not in self._received:
            raise ServerLost(
                f"{server.url} was not there when the weights were sent; it joins with the next update"
            )

    def retire(self) -> None:
        """Do nothing, since nothing is kept."""

    def close(self) -> None:
        """Leave the NCCL group. vLLM aborts it, which also ends a transfer that hangs."""
        sender, self._sender, self._members, self._received = self._sender, None, {}, set()
        if sender is not None:
            sender.shutdown()

    def _regroup(self, members: dict[str, tuple[str, int]], source: Any) -> None:
        """Form a new NCCL group after a server came, left or was restarted."""
        assert self._fleet is not None
        self.close()
        client = FleetClient(
            self._fleet, {url: num_gpus for url, (_, num_gpus) in members.items()}, timeout_s=self.timeout_s
        )
        client.leave_group()
        # Our other ranks do not join the group. They help to gather the weights as the iterator passes them.
        self._sender = make_sender(
            client,
            source,
            master_address=self.master_address or socket.gethostname(),
            master_port=_free_port(),
            world_size=1 + sum(num_gpus for _, num_gpus in members.values()),
        )
        self._members = members


class FleetClient:
    """vLLM's VLLMWeightSyncClient for several servers at once.

    All servers are called at the same time, since they take part in the same NCCL calls.
    """

    def __init__(self, fleet: Fleet, num_gpus: Mapping[str, int], *, timeout_s: float) -> None:
        self._fleet = fleet
        self._num_gpus = dict(num_gpus)
        self._timeout_s = timeout_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offset, bodies = init_info["rank_offset"], {}
        for url, num_gpus in self._num_gpus.items():
            bodies[url] = {"init_info": init_info | {"rank_offset": offset}}
            offset += num_gpus
        self._post("/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", dict.fromkeys(self._num_gpus))

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", {url: {"update_info": update_info} for url in self._num_gpus})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {url: {} for url in self._num_gpus})

    def leave_group(self) -> None:
        self._post("/shutdown_weight_transfer_engine", dict.fromkeys(self._num_gpus))

    def _post(self, path: str, bodies: Mapping[str, Any]) -> None:
        async def post(servers: list[Server]) -> None:
            await asyncio.gather(
                *(
                    server.call("POST", path, bodies[server.url], limit_s=self._timeout_s)
                    for server in servers
                    if server.url in bodies
                )
            )

        self._fleet.run(post)


async def _hold_all(servers: list[Server]) -> dict[str, tuple[str, int]]:
    """Put every server that answers on hold. Return the id of its start and its number of GPUs."""

    async def hold(server: Server) -> tuple[str, int]:
        start = (await server.describe())["start"]
        await server.hold()
        return start, (await server.call("GET", "/get_world_size"))["world_size"]

    found = await asyncio.gather(*(hold(server) for server in servers), return_exceptions=True)
    for outcome in found:
        if isinstance(outcome, BaseException) and not isinstance(outcome, ServerLost):
            raise outcome
    return {
        server.url: outcome
        for server, outcome in zip(servers, found, strict=True)
        if not isinstance(outcome, BaseException)
    }


def _within(limit_s: float, work: Callable[[], None], what: str, *, give_up: Callable[[], None]) -> None:
    """Run ``work`` in a thread that does not keep the process alive.

    Args:
        limit_s: Longest time for ``work``, in seconds.
        work: What to run.
        what: What ``work`` does, for the error.
        give_up: Called if ``work`` failed or took too long. It should let ``work`` end.

    Raises:
        EngineLost: ``work`` failed or took too long. The NCCL group is then unusable, and the run ends with a
            checkpoint.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    is_late, first = thread.is_alive(), next(iter(errors), None)
    if is_late or first is not None:
        why = (
            f"not done within {limit_s:g} s (transport.timeout_s)"
            if first is None
            else f"{type(first).__name__}: {first}"
        )
        with contextlib.suppress(Exception):  # the first error is the one to report
            give_up()
        thread.join(_ABORT_S)
        # vLLM's workers refuse a new group while they wait for the rest of an update.
        raise EngineLost(
            f"NCCLTransport, {what}: {why}. The servers may still wait for the rest of this update: start "
            "them anew (`rpt serve`), then resume the run with --ckpt_path last"
        ) from first


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
