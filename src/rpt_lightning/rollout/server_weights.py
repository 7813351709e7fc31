"""Which servers hold a run's present weights, and how one that does not comes to hold them.

A server is believed when it says which label it has, and not when it comes to what is in the tensors: once the policy's checksums are known, each
server is compared with them before it generates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from rpt_lightning.rollout.server import Server, ServerLost, ServerRefused
from rpt_lightning.rollout.weight_transport import WeightTransport

_LONGEST_LOAD_S = 900.0


class PresentWeights:
    """The weights of one update.

    Args:
        label: What servers call them.
        transport: Has them, or will.
        acquaint: Raises ServerLost for a server that does not fit the run.
    """

    def __init__(
        self, label: str, transport: WeightTransport, acquaint: Callable[[Server], Awaitable[None]]
    ) -> None:
        self.label = label
        self.expected: dict[str, str] = {}
        """Checksums of the policy's tensors that were compared last; empty as long as none were."""
        self.compared: set[str] = set()
        """Urls of the servers that were found to hold these."""
        self._transport = transport
        self._acquaint = acquaint

    async def bring_in(self, server: Server) -> None:
        """Makes sure that the server holds these weights, and that they were compared. Raises ServerLost where that fails."""
        is_held = await self._is_held(server)
        if not is_held:
            self.compared.discard(server.url)
            await self._acquaint(server)
            await server.hold()
            await self._transport.load(server)
        if not self._is_compared(server):  # it came after the others were, or could not be
            if await server.checksums(list(self.expected)) != self.expected:
                raise ServerLost(f"{server.url} should hold the weights of {self.label}, and holds others")
            self.compared.add(server.url)
        if not is_held:
            await server.release(self.label)

    async def bring_in_as_one_of_several(self, server: Server) -> None:
        """Ranks generate at the same time: one of them loads the weights into a server that came back, the others wait for it."""
        if await self._is_held(server) and self._is_compared(server):
            return
        if not await server.may_load(self.label, for_s=_LONGEST_LOAD_S):
            raise ServerLost(f"{server.url}: another rank is loading the weights of {self.label} into it")
        try:
            await self.bring_in(server)  # looks again: a rank that was faster is done by now
        finally:
            with contextlib.suppress(ServerLost):
                await server.loaded()

    def _is_compared(self, server: Server) -> bool:
        return not self.expected or server.url in self.compared

    async def _is_held(self, server: Server) -> bool:
        """By its own word. A server that refuses us (another key, another program on its port) is as good as none in the middle of a run."""
        try:
            return await server.label() == self.label
        except ServerRefused as error:
            raise ServerLost(str(error)) from error
