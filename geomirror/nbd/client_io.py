"""A small NBD client for the demo, the tests and the benchmark: one connection, many requests.

Requests are pipelined up to `depth`; more wait. Reconnecting is the caller's business: when the
connection is lost every request in flight fails with `UnreachableError`, and whether its write took
effect is unknown, as with any disk that lost power.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

from geomirror.errors import RefusedError, RemoteProtocolError, UnreachableError
from geomirror.nbd import constants as c
from geomirror.nbd.client_connection_io import ClientConnection
from geomirror.nbd.client_handshake import parse_uri
from geomirror.nbd.protocol import Buffer
from geomirror.nbd.reply_parser import Pending

_LENGTH_MAX = (1 << 32) - (1 << 20)
"""Longest TRIM, WRITE_ZEROES or BLOCK_STATUS sent as one request: u32, and still aligned."""


class NbdClient(ClientConnection):
    """One connection to one export; make it with `NbdClient.connect`.

    All errors of the server are typed (`RefusedError`, `NoSpaceError`, `UsageError`, `FencedError`
    or `StorageError`), with its errno in `error.__cause__.errno`.
    """

    @classmethod
    async def connect(
        cls,
        uri: str,
        *,
        depth: int = 64,
        wants_structured: bool = True,
        contexts: Sequence[str] = (c.ALLOCATION_CONTEXT,),
        timeout_s: float = 10.0,
    ) -> NbdClient:
        """Connect and attach.

        :param uri: `nbd+unix:///EXPORT?socket=PATH` or `nbd://HOST[:PORT]/EXPORT`.
        :param depth: requests in flight at most; further ones wait.
        :param contexts: metadata contexts to ask for; the server grants those that it has.
        :raises UsageError: the URI is malformed.
        :raises UnreachableError: nobody answers there, or not within `timeout_s`.
        :raises RefusedError, NotFoundError: the server's answer.
        """
        address = parse_uri(uri)
        loop = asyncio.get_running_loop()
        client = cls(
            address.export, depth=depth, wants_structured=wants_structured, contexts=contexts
        )
        is_attached = False
        try:
            async with asyncio.timeout(timeout_s):
                if address.path is not None:
                    await loop.create_unix_connection(lambda: client, address.path)
                else:
                    await loop.create_connection(lambda: client, address.host, address.port)
                await client.attach()
            is_attached = True
        except (OSError, TimeoutError) as error:
            raise UnreachableError(
                f'cannot connect to "{uri}": {error or "no answer"}', hint="is the node running?"
            ) from error
        finally:
            if not is_attached:
                client.abort()
        return client

    async def __aenter__(self) -> NbdClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def read(self, offset: int, length: int) -> bytearray:
        """`length` bytes at `offset`, in a new buffer that is the caller's.

        Longer than the server's payload limit is read in pieces, one atomic read each.
        """
        data = bytearray(length)
        target = memoryview(data)
        step = self.export.maximum_payload
        futures = []
        for at in range(0, length, step):
            await self.wait_for_room()
            futures.append(self.start_read(offset + at, target[at : at + step]))
        await _all(futures)
        return data

    async def write(self, offset: int, data: Buffer, *, is_fua: bool = False) -> None:
        """Write; *completed* when it returns, durable with `is_fua` or after `flush`.

        `data` must not change until then.
        """
        view = memoryview(data).cast("B")
        step = self.export.maximum_payload
        futures = []
        for at in range(0, len(view), step):
            await self.wait_for_room()
            futures.append(self.start_write(offset + at, view[at : at + step], is_fua=is_fua))
        await _all(futures)

    async def flush(self) -> None:
        """Make every write that completed before this call durable."""
        await self.wait_for_room()
        await self.start(c.CMD_FLUSH, 0, 0)

    async def trim(self, offset: int, length: int, *, is_fua: bool = False) -> None:
        """Discard a range; geomirror makes it read as zeros."""
        await self._ranges(c.CMD_TRIM, offset, length, c.CMD_FLAG_FUA if is_fua else 0)

    async def zero(
        self, offset: int, length: int, *, is_fua: bool = False, may_punch: bool = True
    ) -> None:
        """Make a range read as zeros, without sending them."""
        flags = (c.CMD_FLAG_FUA if is_fua else 0) | (0 if may_punch else c.CMD_FLAG_NO_HOLE)
        await self._ranges(c.CMD_WRITE_ZEROES, offset, length, flags)

    async def block_status(
        self, offset: int, length: int, context: str = c.ALLOCATION_CONTEXT
    ) -> list[tuple[int, int]]:
        """What a metadata context says of a range, as (length, flags), complete and ascending.

        :param context: one of those asked for when connecting.
        :raises RefusedError: the server did not grant the context.
        """
        ids = [number for number, name in self.export.contexts.items() if name == context]
        if not ids:
            raise RefusedError(f'export "{self.export.name}" grants no {context}')
        found: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            await self.wait_for_room()
            part = min(end - offset, _LENGTH_MAX)
            reply = await self.start(c.CMD_BLOCK_STATUS, offset, part)
            extents = reply.extents.get(ids[0], [])
            for extent_bytes, flags in extents:
                extent_bytes = min(extent_bytes, end - offset)
                offset += extent_bytes
                if found and found[-1][1] == flags:
                    extent_bytes += found.pop()[0]
                found.append((extent_bytes, flags))
            if not sum(extent[0] for extent in extents):
                raise RemoteProtocolError("the server described no byte")
        return found

    async def chunks(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        chunk_bytes: int = 1 << 20,
        depth: int = 8,
    ) -> AsyncIterator[tuple[int, bytearray]]:
        """Read a range in order as (offset, bytes), `depth` reads ahead: to verify quickly."""
        end = self.size_bytes if length is None else offset + length
        ahead: deque[tuple[int, bytearray, asyncio.Future[Pending]]] = deque()
        while offset < end or ahead:
            while offset < end and len(ahead) < depth:
                data = bytearray(min(chunk_bytes, end - offset))
                await self.wait_for_room()
                ahead.append((offset, data, self.start_read(offset, memoryview(data))))
                offset += len(data)
            at, data, future = ahead.popleft()
            await future
            yield at, data

    async def _ranges(self, command: int, offset: int, length: int, flags: int) -> None:
        futures = []
        for at in range(0, length, _LENGTH_MAX):
            await self.wait_for_room()
            part = min(length - at, _LENGTH_MAX)
            futures.append(self.start(command, offset + at, part, flags))
        await _all(futures)


async def _all(futures: list[asyncio.Future[Pending]]) -> None:
    """Wait for all, then raise the first error: no write may still be under way after it."""
    if len(futures) == 1:
        await futures[0]
        return
    results = await asyncio.gather(*futures, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
