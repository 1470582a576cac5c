"""The join endpoint: one bounded exchange per connection, on the port of the links.

It is the only thing that a stranger can talk to, and only one who knows the authority's key hash
(from a token). The transaction runs on a worker thread; the answer goes out after it is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from geomirror.environment import SECOND, Clock, Entropy
from geomirror.errors import (
    AuthError,
    GeomirrorError,
    LimitExceededError,
    RefusedError,
    RemoteProtocolError,
)
from geomirror.tunnel import authority_io
from geomirror.tunnel.attempts import AttemptLimiter
from geomirror.tunnel.authority import certificate_pem
from geomirror.tunnel.certificates import load_certificate, read_claims
from geomirror.tunnel.enrollment import (
    NONCE_BYTES,
    VERSION,
    Hello,
    Join,
    Welcome,
    encode_line,
    read_request_line,
    refusal,
)
from geomirror.tunnel.network_state_io import NetworkState

Refused = Callable[[str, GeomirrorError], None]
"""Told the source address and the reason of everything that was not let in."""
Joined = Callable[[str], None]
"""Told the name of a node that has just become a member."""


class JoinService:
    """Serves join exchanges with the records of the authority on this node."""

    def __init__(
        self,
        state: NetworkState,
        clock: Clock,
        entropy: Entropy,
        *,
        refused: Refused,
        joined: Joined,
    ) -> None:
        self._state = state
        self._clock = clock
        self._entropy = entropy
        self._refused = refused
        self._joined = joined
        self._attempts = AttemptLimiter(state.limits)
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, transport: asyncio.Transport, source: str, leaf_der: bytes) -> None:
        """Take over an authenticated-by-nothing connection of the join protocol.

        :param leaf_der: the certificate that our side showed in this connection's handshake.
        """
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=self._state.limits.join_line_bytes_max, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        task = loop.create_task(self._serve(reader, writer, source, leaf_der))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End all exchanges. A transaction under way is completed, its answer is lost."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        source: str,
        leaf_der: bytes,
    ) -> None:
        try:
            async with asyncio.timeout(self._state.limits.join_exchange_ns_max / SECOND):
                try:
                    answer = encode_line(await self._exchange(reader, writer, source, leaf_der))
                except GeomirrorError as error:
                    self._refused(source, error)
                    answer = encode_line(refusal(error))
                writer.write(answer)
                await writer.drain()
                # The joiner closes first, so that no reset overtakes the answer.
                await reader.read()
        except (TimeoutError, OSError) as error:
            self._refused(source, RemoteProtocolError(f"a join exchange ended early: {error}"))
        finally:
            writer.transport.abort()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        source: str,
        leaf_der: bytes,
    ) -> Welcome:
        state = self._state
        if len(self._tasks) > state.limits.join_connections_max:
            raise RefusedError("too many nodes are joining", hint="try again in a few seconds")
        state.require_authority()
        self._attempts.check(source, self._clock.now_ns())
        nonce = self._entropy.token_bytes(NONCE_BYTES)
        hello = Hello(
            version=VERSION,
            network=state.network,
            authority=certificate_pem(state.authority_certificate),
            nonce=nonce,
            wall_ns=self._clock.wall_ns(),
        )
        writer.write(encode_line(hello))
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            raise RemoteProtocolError("a join exchange was given up") from None
        except asyncio.LimitOverrunError:
            raise LimitExceededError("a line of the join exchange is too long") from None
        # Again: other connections of this source may have failed since.
        self._attempts.check(source, self._clock.now_ns())
        try:
            return await self._decide(line, source, nonce, leaf_der)
        except (AuthError, RemoteProtocolError):
            self._attempts.failed(source, self._clock.now_ns())
            raise

    async def _decide(self, line: bytes, source: str, nonce: bytes, leaf_der: bytes) -> Welcome:
        request = read_request_line(line)
        state, wall_ns, entropy = self._state, self._clock.wall_ns(), self._entropy
        if not isinstance(request, Join):
            return await asyncio.to_thread(
                authority_io.renew_expired,
                state,
                request,
                nonce=nonce,
                leaf_der=leaf_der,
                wall_ns=wall_ns,
                entropy=entropy,
            )
        welcome = await asyncio.to_thread(
            authority_io.enroll,
            state,
            request,
            observed_host=source,
            wall_ns=wall_ns,
            entropy=entropy,
        )
        state.membership.merge(welcome.members)
        name = read_claims(load_certificate(welcome.certificate.encode("ascii"))).name
        self._joined(name)
        return welcome
