"""Rollouts on any number of vLLM servers, on this machine or others. `rpt serve` starts them.

This module speaks HTTP and does not import vllm. It accepts only completions from the trainer's latest
weights:

- After an update, a server carries a label made from this start of this run and the version. While it loads,
  and after a restart, it has no label of ours.
- For each completion, vLLM reports the labels under which its tokens were generated. A completion with
  another label is discarded and requested again.
- ``check_weights`` compares checksums of tensors on every server with the policy's.

A server that dies, hangs or answers with an error is left out until the next update of the weights, and its
requests go to the others. If no server is left, all are tried again at growing intervals for up to
``max_wait_s``. A server that returns without weights gets them again if the transport still has them.

In a run with several ranks, each rank generates on all servers. Only rank 0 sends updates and compares the
servers' weights. If a server returns between two updates, the first rank that contacts it loads the weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NoReturn

import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from rpt_lightning.rollout.engines.base import EngineDtype, EngineLost, RolloutEngine, Sample
from rpt_lightning.rollout.prefix_cache import UnlimitedPrefixCache
from rpt_lightning.rollout.servers.access import find_key
from rpt_lightning.rollout.servers.agreement import architecture, check_facts
from rpt_lightning.rollout.servers.dispatch import Worker, dispatch
from rpt_lightning.rollout.servers.rank0_sync import is_first_rank, on_first_rank
from rpt_lightning.rollout.servers.server import Fleet, Server, ServerLost, ServerRefused
from rpt_lightning.rollout.servers.weights import PresentWeights
from rpt_lightning.rollout.weight_sync.checksum import checksum
from rpt_lightning.rollout.weight_sync.sent_weights import SentWeights
from rpt_lightning.rollout.weight_sync.transport import WeightTransport
from rpt_lightning.types import GenerationRequest, PromptTokens

log = logging.getLogger(__name__)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_INTERRUPT_S = 0.2  # interval between checks for an interrupt


class VLLMServerEngine(RolloutEngine):
    """An engine that generates on vLLM servers.

    Args:
        urls: Addresses of the servers, such as ``[http://10.0.0.5:8000, http://10.0.0.6:8000]``.
        transport: How weights reach the servers.
        dtype: Data type of the weights and the computation. The servers must be started with the same one.
        api_key_env: Environment variable that holds the servers' key.
        api_key_file: File with the key, used if the variable is not set. Nobody else may be able to read it.
        max_num_seqs: Number of completions that this process runs on one server at a time.
        timeout_s: Longest time without an answer from a working server, in seconds. After it, the server
            counts as dead.
        request_timeout_s: Longest time for the completions of one prompt, in seconds. It is a safeguard in
            addition to ``timeout_s``.
        max_wait_s: Without a usable server, wait this many seconds for one, and then end the run with a
            checkpoint. At its start, the run waits this long for all servers. With several ranks, this must
            be shorter than the time limit of their collectives.
    """

    def __init__(
        self,
        urls: list[str],
        transport: WeightTransport,
        dtype: EngineDtype = "bfloat16",
        api_key_env: str = "RPT_SERVER_KEY",
        api_key_file: str | None = None,
        max_num_seqs: int = 128,
        timeout_s: float = 60.0,
        request_timeout_s: float = 3600.0,
        max_wait_s: float = 300.0,
    ) -> None:
        super().__init__(dtype)
        if (
            not urls
            or len(set(urls)) < len(urls)
            or not all(url.startswith(("http://", "https://")) for url in urls)
        ):
            raise ValueError(f"rollout.engine.urls={urls}: give each server once, as http://HOST:PORT")
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("timeout_s", timeout_s),
            ("request_timeout_s", request_timeout_s),
        ):
            if value <= 0:
                raise ValueError(f"rollout.engine.{name}={value} must be positive")
        self.urls = urls
        self.transport = transport
        self.api_key_env = api_key_env
        self.api_key_file = api_key_file
        self.max_num_seqs = max_num_seqs
        self.timeout_s = timeout_s
        self.request_timeout_s = request_timeout_s
        self.max_wait_s = max_wait_s
        self.num_lost = 0
        """How often a server was lost since the engine was made."""
        self._fleet: Fleet | None = None
        self._run_label = ""
        self._block_sizes: set[int] = set()  # of the servers' prefix caches; 0 is a server without one
        self._prefixes: UnlimitedPrefixCache | None = None  # since the last update
        self._weights = PresentWeights("", transport, self._reacquaint)
        self._out: dict[str, str] = {}  # url -> reason
        self._was_in: set[str] = set()  # urls of servers that held the weights when last checked
        self._differing: str | None = None  # a server found to hold other weights
        self._architecture: dict[str, object] = {}

    @property
    def description(self) -> str:
        return (
            f"{len(self.urls)} vLLM servers ({', '.join(self.urls)}), {self.dtype}, "
            f"up to {self.max_num_seqs} completions each at once"
        )

    @property
    def servers(self) -> tuple[int, int]:
        return self.num_usable, self.num_lost

    @property
    def sent_weights(self) -> SentWeights | None:
        return self.transport.sent

    @property
    def num_usable(self) -> int:
        """Number of servers that are not left out."""
        return len(self.urls) - len(self._out)

    def _start(self, model_path: str, seed: int) -> None:
        key = find_key(self.api_key_env, self.api_key_file)
        self._fleet = Fleet(
            self.urls, key=key, timeout_s=self.timeout_s, request_timeout_s=self.request_timeout_s
        )
        self._architecture = architecture(AutoConfig.from_pretrained(model_path))
        self._out = {}
        # Each start has its own label, so a server that hung through the end of an earlier start cannot be
        # mistaken for one of this start.
        self._run_label, block_size = on_first_rank(self._open)
        self.prompt_tokens = PromptTokens(total=0, cached=0, shareable=0) if block_size else None
        self._prefixes = UnlimitedPrefixCache(block_size) if block_size else None

    def _open(self) -> tuple[str, int]:
        """Return the prefix of this start's labels, and the block size in which servers share prompts.

        The size is 0 unless all servers share prompts.
        """
        assert self._fleet is not None
        self.transport.open(self._fleet)
        log.info("waiting for %d servers", len(self.urls))
        try:
            self._fleet.run(lambda servers: self._wait(servers, self._acquaint, enough=len(servers)))
        except BaseException:
            self.transport.close()
            raise
        return secrets.token_hex(4), max(self._block_sizes) if all(self._block_sizes) else 0

    def _update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._weights, self._differing = (
            PresentWeights(f"{self._run_label}:{version}", self.transport, self._reacquaint),
            None,
        )
        if self._prefixes is not None:
            self._prefixes = UnlimitedPrefixCache(self._prefixes.block_size)
        self._out = on_first_rank(
            lambda: self._deliver(weights, version), meanwhile=lambda: _exhaust(weights)
        )
        if not is_first_rank():
            self.transport.follow(version)

    def _deliver(self, weights: Iterable[tuple[str, Tensor]], version: int) -> dict[str, str]:
        assert self._fleet is not None
        self._out = {}
        try:
            self._fleet.run(lambda servers: self._wait(servers, self._reacquaint))
            self.transport.publish(weights, version=version, dtype=self.dtype, shapes=self._weight_shapes)
        except BaseException:
            # Gathering sharded weights is a collective, so the other ranks continue even after an error here.
            # A transport that gave up may still hold the iterator in a thread. The first error is the one to
            # raise.
            with contextlib.suppress(Exception):
                _exhaust(weights)
            raise
        _exhaust(weights)  # a transport without a server does not read them
        usable = self._fleet.run(
            lambda servers: self._wait(servers, self._weights.bring_in, first_try=self._usable(servers))
        )
        self._was_in.update(server.url for server in usable)
        self.transport.retire()
        return self._out

    def _generate(self, requests: Sequence[GenerationRequest]) -> list[list[Sample]]:
        assert self._fleet is not None
        is_one_of_several = dist.is_available() and dist.is_initialized()
        held = self._weights
        bring_in = held.bring_in_as_one_of_several if is_one_of_several else held.bring_in

        async def generate(servers: list[Server]) -> list[list[Sample]]:
            if is_one_of_several:  # so that ranks do not all begin with the same server
                first = dist.get_rank() % len(servers)
                servers = servers[first:] + servers[:first]

            async def find() -> Sequence[Worker]:
                usable = await self._wait(servers, bring_in, first_try=self._usable(servers))
                self._was_in.update(server.url for server in usable)
                return [_Holder(server, held.label) for server in usable]

            work = asyncio.ensure_future(dispatch(requests, find, room=self.max_num_seqs, on_lost=self._lose))
            try:
                while not (await asyncio.wait([work], timeout=_INTERRUPT_S))[0]:
                    self._check_interrupted()
                return work.result()
            finally:
                work.cancel()  # running requests end with their connections
                await asyncio.gather(work, return_exceptions=True)

        samples = self._fleet.run(generate)
        self._count_prompts(requests)
        return samples

    def _count_prompts(self, requests: Sequence[GenerationRequest]) -> None:
        """Count prompt tokens as if caches were unlimited and each document's positions were on one server.

        The servers do not report what their caches served.
        """
        if self.prompt_tokens is not None and self._prefixes is not None:
            total = sum(request.n * len(request.prompt_ids) for request in requests)
            cached = sum(self._prefixes.serve(request.prompt_ids, request.n) for request in requests)
            # shareable is 0 because we do not measure the share of what was possible.
            self.prompt_tokens += PromptTokens(total=total, cached=cached, shareable=0)

    def _read_weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read from a server that differed in the latest comparison, if there is one."""
        assert self._fleet is not None

        async def read(servers: list[Server]) -> dict[str, Tensor]:
            return await min(self._usable(servers), key=lambda server: server.url != self._differing).read(
                names
            )

        return self._fleet.run(read)

    def _differing_weights(self, wanted: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
        self._weights.expected, self._weights.compared, differing = on_first_rank(
            lambda: self._compare(wanted)
        )
        self._differing = next(iter(differing), None)
        return differing

    def _compare(
        self, wanted: Mapping[str, Tensor]
    ) -> tuple[dict[str, str], set[str], dict[str, tuple[str, ...]]]:
        """Return the policy's checksums, the servers that match, and the names that differ on the others.

        A server that could not be compared is in neither of the two.
        """
        assert self._fleet is not None
        expected = {name: checksum(tensor) for name, tensor in wanted.items()}

        async def compare(servers: list[Server]) -> tuple[set[str], dict[str, tuple[str, ...]]]:
            usable = self._usable(servers)
            held = await asyncio.gather(
                *(server.checksums(list(expected)) for server in usable), return_exceptions=True
            )
            same, differing = set(), {}
            for server, sums in zip(usable, held, strict=True):
                if isinstance(sums, ServerLost | ServerRefused):
                    self._lose(server, sums)
                elif isinstance(sums, BaseException):
                    raise sums
                elif wrong := tuple(name for name, value in expected.items() if sums[name] != value):
                    differing[server.url] = wrong
                else:
                    same.add(server.url)
            return same, differing

        return expected, *self._fleet.run(compare)

    def _close(self) -> None:
        if is_first_rank():
            self.transport.close()
        self._fleet = None

    async def _acquaint(self, server: Server) -> None:
        """Raise ValueError if the server cannot serve this run."""
        facts = await server.describe()
        check_facts(
            server.url, facts, dtype=self.dtype, model=self._architecture, max_model_len=self.max_model_len
        )
        self._block_sizes.add(facts["prefix_block_size"])

    async def _reacquaint(self, server: Server) -> None:
        """Check a server in the middle of a run, when one with other flags or another key counts as lost."""
        try:
            await self._acquaint(server)
        except ValueError as error:
            raise ServerLost(str(error)) from error

    async def _wait(
        self,
        servers: list[Server],
        prepare: Callable[[Server], Awaitable[None]],
        *,
        enough: int = 1,
        first_try: Sequence[Server] | None = None,
    ) -> list[Server]:
        """Return the servers for which ``prepare`` succeeds, and leave out the others.

        Args:
            servers: All servers. They are tried again and again, at growing intervals.
            prepare: Prepares a server, or raises ServerLost.
            enough: Try again until this many servers succeed. After ``max_wait_s``, one is enough.
            first_try: Servers to try first. If any of these succeeds, the others are not tried.

        Raises:
            EngineLost: No server succeeds within ``max_wait_s``.
        """
        started_s, pause_s = time.monotonic(), _FIRST_WAIT_S
        if first_try is not None:
            if usable := await self._prepared(first_try, prepare):
                return usable
            self._check_waited(time.monotonic() - started_s)
        while True:
            usable = await self._prepared(servers, prepare)
            waited_s = time.monotonic() - started_s
            if len(usable) >= enough or (usable and waited_s >= self.max_wait_s):
                for url, why in self._out.items():
                    log.warning("server left out until the next weight update: %s: %s", url, why)
                return usable
            self._check_waited(waited_s)
            log.warning(
                "%d of %d servers can be used; trying again in %.1f s", len(usable), len(servers), pause_s
            )
            await asyncio.sleep(min(pause_s, self.max_wait_s - waited_s))
            pause_s = min(2 * pause_s, _LONGEST_WAIT_S)

    async def _prepared(
        self, servers: Sequence[Server], prepare: Callable[[Server], Awaitable[None]]
    ) -> list[Server]:
        """Prepare these servers once, all at the same time. Return those that can be used."""
        outcomes = await asyncio.gather(*(prepare(server) for server in servers), return_exceptions=True)
        usable = []
        for server, outcome in zip(servers, outcomes, strict=True):
            if isinstance(outcome, ServerLost):
                self._put_out(server, outcome)
            elif outcome is not None:
                raise outcome
            else:
                self._out.pop(server.url, None)
                usable.append(server)
        return usable

    def _check_waited(self, waited_s: float) -> None:
        """Raise EngineLost if the wait for a server has taken too long."""
        if waited_s >= self.max_wait_s:
            raise EngineLost(
                f"none of the {len(self.urls)} servers could be used for {waited_s:.0f} s "
                f"(rollout.engine.max_wait_s={self.max_wait_s:g}). "
                + "; ".join(f"{url}: {why}" for url, why in self._out.items())
                + ". Start them again (`rpt serve`) and resume the run with --ckpt_path last"
            )

    def _usable(self, servers: Sequence[Server]) -> list[Server]:
        return [server for server in servers if server.url not in self._out]

    def _lose(self, worker: Worker | Server, error: ServerLost | ServerRefused) -> None:
        server = worker.server if isinstance(worker, _Holder) else worker
        assert isinstance(server, Server)
        self._put_out(server, error)
        log.warning("lost a server; its requests go to the others: %s", error)

    def _put_out(self, server: Server, error: ServerLost | ServerRefused) -> None:
        # Servers that have not held weights yet, or are already out, do not count as lost.
        self.num_lost += server.url in self._was_in
        self._was_in.discard(server.url)
        self._out[server.url] = str(error)


class _Holder:
    """A server that holds the weights with a given label."""

    def __init__(self, server: Server, label: str) -> None:
        self.server = server
        self._label = label

    async def generate(self, request: GenerationRequest) -> list[Sample]:
        try:
            return await self.server.generate(request, self._label)
        except ServerRefused as error:
            raise ServerLost(str(error)) from error

    async def watch(self) -> NoReturn:
        try:
            await self.server.watch(self._label)
        except ServerRefused as error:
            raise ServerLost(str(error)) from error


def _exhaust(weights: Iterable[tuple[str, Tensor]]) -> None:
    deque(weights, maxlen=0)
