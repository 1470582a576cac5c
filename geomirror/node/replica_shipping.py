"""What an operator asks of the stream of a resource: to wait for it, to stop it, to go on."""

from __future__ import annotations

import asyncio

from geomirror.errors import UsageError, WaitTimeoutError
from geomirror.node.replica_roles import POLL_S, ReplicaRoles
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.resync_intake import CONSISTENT
from geomirror.wan_protocol.sender import FOLD, STREAM, Sender


class ReplicaShipping(ReplicaRoles):
    """The part of `ReplicaService` that looks at positions of peers."""

    async def wait(self, kind: str, timeout_s: float) -> None:
        """Until every peer has all that is completed now.

        :param kind: `durable` or `applied`.
        :raises WaitTimeoutError: some peer has not.
        """
        core, runner = self._core, self._runner
        if not isinstance(core, Primary):
            raise UsageError(f'"{self.definition.name}" is a secondary here; wait at the primary')
        target = core.target_epoch
        core.seal_now(runner.now_ns())
        runner.drive()
        try:
            async with asyncio.timeout(timeout_s):
                while not self._has_all(core, kind, target):
                    if core.fenced is not None:
                        raise core.fenced
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise WaitTimeoutError(
                f'"{self.definition.name}": not every peer has epoch {target} {kind} '
                f"after {timeout_s:g} s",
                hint=f'see "geomirror status {self.definition.name}"',
            ) from None

    def _has_all(self, core: Primary, kind: str, target: int) -> bool:
        def has(sender: Sender) -> bool:
            reached = sender.durable_epoch if kind == "durable" else sender.applied_epoch
            is_streaming = sender.is_open and sender.mode in (STREAM, FOLD)
            return is_streaming and sender.data_state == CONSISTENT and reached >= target

        return core.engine.sealed_epoch >= target and all(map(has, core.senders.values()))

    def pause(self, peer: str | None) -> None:
        """Stop shipping to a peer, or to all; at a secondary: stop applying."""
        self._set_paused(peer, is_paused=True)

    def resume(self, peer: str | None) -> None:
        """Go on."""
        self._set_paused(peer, is_paused=False)

    def _set_paused(self, peer: str | None, *, is_paused: bool) -> None:
        if not isinstance(self._core, Primary):
            raise UsageError(f'"{self.definition.name}" is a secondary here; pause at the primary')
        self._core.pause(peer, is_paused=is_paused)
        self._runner.drive()
