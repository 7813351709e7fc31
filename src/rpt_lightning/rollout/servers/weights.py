"""Track which servers hold a run's current weights, and load the weights into those that do not.

A server's own statement about its label is trusted, but not about the content of its tensors. Once the
policy's checksums are known, each server is compared with them before it generates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from rpt_lightning.rollout.servers.server import Server, ServerLost, ServerRefused
from rpt_lightning.rollout.weight_sync.transport import WeightTransport

_LONGEST_LOAD_S = 900.0


class PresentWeights:
    """The weights of one update.

    Args:
        label: The servers' name for these weights.
        transport: Has the weights, or will have them.
        acquaint: Raises ServerLost for a server that does not fit the run.
    """

    def __init__(
        self, label: str, transport: WeightTransport, acquaint: Callable[[Server], Awaitable[None]]
    ) -> None:
        self.label = label
        self.expected: dict[str, str] = {}
        """Checksums of the policy's tensors from the latest comparison. Empty before the first one."""
        self.compared: set[str] = set()
        """Urls of the servers whose weights matched these."""
        self._transport = transport
        self._acquaint = acquaint

    async def bring_in(self, server: Server) -> None:
        """Make sure that the server holds these weights and that they were compared, or raise ServerLost."""
        is_held = await self._is_held(server)
        if not is_held:
            self.compared.discard(server.url)
            await self._acquaint(server)
            await server.hold()
            await self._transport.load(server)
        if not self._is_compared(server):  # it was not available when the others were compared
            if await server.checksums(list(self.expected)) != self.expected:
                raise ServerLost(f"{server.url} should hold the weights of {self.label}, but holds others")
            self.compared.add(server.url)
        if not is_held:
            await server.release(self.label)

    async def bring_in_as_one_of_several(self, server: Server) -> None:
        """Load the weights as one of several ranks that generate at the same time.

        One rank loads the weights into a server that came back, and the others wait for it.
        """
        if await self._is_held(server) and self._is_compared(server):
            return
        if not await server.may_load(self.label, for_s=_LONGEST_LOAD_S):
            raise ServerLost(f"{server.url}: another rank is loading the weights of {self.label} into it")
        try:
            await self.bring_in(server)  # checks again, because a faster rank may be done by now
        finally:
            with contextlib.suppress(ServerLost):
                await server.loaded()

    def _is_compared(self, server: Server) -> bool:
        return not self.expected or server.url in self.compared

    async def _is_held(self, server: Server) -> bool:
        """Return whether the server says that it holds these weights.

        In the middle of a run, a server that refuses us (another key, another program on its port) counts as
        lost.
        """
        try:
            return await server.label() == self.label
        except ServerRefused as error:
            raise ServerLost(str(error)) from error
