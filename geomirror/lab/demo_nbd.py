"""The demo's NBD clients: nbdcopy where it is installed, else our own, and the writer."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from geomirror.errors import GeomirrorError, NotFoundError, UnreachableError
from geomirror.lab.demo_ledger import Ledger, Verdict, Write
from geomirror.lab.process_io import run
from geomirror.limits import BLOCK_BYTES, MIB
from geomirror.nbd.client_io import NbdClient

COPY_TIMEOUT_S = 120.0
BATCH_WRITES = 16
"""Writes under way together: a database's writers, not a benchmark."""
FLUSH_BATCHES = 8
"""A flush after so many batches."""
RECONNECT_S = 0.1


def has_nbdcopy() -> bool:
    """Whether libnbd's copying client is installed; a client that is not ours proves more."""
    return shutil.which("nbdcopy") is not None


async def copy_in(image: Path, uri: str) -> str:
    """Write a whole image file through NBD and flush; the name of the client that did it."""
    if has_nbdcopy():
        await _nbdcopy("--flush", str(image), uri)
        return "nbdcopy"
    async with await NbdClient.connect(uri, depth=8) as client:
        data = memoryview(await asyncio.to_thread(image.read_bytes))
        await asyncio.gather(
            *(client.write(at, data[at : at + MIB]) for at in range(0, len(data), MIB))
        )
        await client.flush()
    return "geomirror's client"


async def copy_out(uri: str, image: Path) -> None:
    """Read a whole export into a new file."""
    if has_nbdcopy():
        await _nbdcopy(uri, str(image))
        return
    async with await NbdClient.connect(uri) as client:
        parts = [data async for _, data in client.chunks()]
    await asyncio.to_thread(image.write_bytes, b"".join(parts))


async def _nbdcopy(*arguments: str) -> None:
    output = await run(["nbdcopy", *arguments], timeout_s=COPY_TIMEOUT_S)
    if output.returncode != 0:
        raise GeomirrorError(f"nbdcopy failed: {output.stderr.decode(errors='replace').strip()}")


async def read_slots(client: NbdClient, offsets: Sequence[int]) -> dict[int, bytes]:
    """The blocks at `offsets` (ascending or not), read in long runs."""
    wanted = set(offsets)
    first, last = min(offsets), max(offsets) + BLOCK_BYTES
    found: dict[int, bytes] = {}
    async for at, data in client.chunks(first, last - first):
        for inside in range(0, len(data), BLOCK_BYTES):
            if at + inside in wanted:
                found[at + inside] = bytes(data[inside : inside + BLOCK_BYTES])
    return found


async def read_ledger(uri: str, ledger: Ledger) -> Callable[[int], bytes]:
    """Read all blocks of a ledger; what gives a slot's block."""
    async with await NbdClient.connect(uri) as client:
        blocks = await read_slots(client, ledger.offsets)
    return lambda slot: blocks[ledger.offsets[slot]]


async def judge_export(uri: str, ledger: Ledger) -> Verdict:
    """Judge an export that stands still while it is read."""
    return ledger.judge(await read_ledger(uri, ledger))


async def write_blocks(uri: str, blocks: Sequence[tuple[int, bytes]]) -> None:
    """Write (offset, content) of all blocks at once, and flush."""
    async with await NbdClient.connect(uri) as client:
        await asyncio.gather(*(client.write(offset, content) for offset, content in blocks))
        await client.flush()


async def read_a_block(uri: str) -> None:
    """Return when the first block of an export is read."""
    async with await NbdClient.connect(uri) as client:
        await client.read(0, BLOCK_BYTES)


async def write_and_flush(uri: str) -> None:
    """One write that changes nothing, durable at return: whoever answers it serves writers."""
    async with await NbdClient.connect(uri) as client:
        content = await client.read(0, BLOCK_BYTES)
        await client.write(0, content, is_fua=True)


class Writer:
    """Overwrites blocks of the ledger's files at a steady rate and survives its server's death.

    As a kernel's NBD device does, it connects again and issues anew what was not answered. Before
    that it checks that everything a flush confirmed, and everything completed, is still there.
    """

    def __init__(self, uri: str, ledger: Ledger, bytes_per_second: int) -> None:
        self.reconnects = 0
        self.verdicts: list[Verdict] = []
        """What was found after each reconnect."""
        self.outage_seconds_max = 0.0
        """Longest time from a lost connection to the next one that serves."""
        self._uri = uri
        self._ledger = ledger
        self._pause_s = BATCH_WRITES * BLOCK_BYTES / bytes_per_second
        self._unknown: list[Write] = []
        self._is_stopping = False

    def stop(self) -> None:
        """End `run` after the batch under way, with a flush."""
        self._is_stopping = True

    async def run(self) -> None:
        """Write until `stop`; everything is completed and confirmed by a flush at return.

        :raises GeomirrorError: the server answered a write with an error, or stays away too long.
        """
        loop = asyncio.get_running_loop()
        is_finished = False
        lost_at = loop.time()
        while not is_finished:
            client = await self._connect()
            if self.reconnects:
                self.outage_seconds_max = max(self.outage_seconds_max, loop.time() - lost_at)
            try:
                if self._unknown or self._ledger.write_count:
                    await self._check_survivors(client)
                await self._issue(client, self._unknown)
                await self._write(client)
                is_finished = True
            except UnreachableError:
                self.reconnects += 1
                lost_at = loop.time()
            finally:
                await client.close()

    async def _connect(self) -> NbdClient:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 30
        while True:
            try:
                return await NbdClient.connect(self._uri)
            except (UnreachableError, NotFoundError):
                # A daemon that just started listens a moment before it serves its resources.
                if loop.time() > deadline:
                    raise
            await asyncio.sleep(RECONNECT_S)

    async def _check_survivors(self, client: NbdClient) -> None:
        blocks = await read_slots(client, self._ledger.offsets)
        self.verdicts.append(self._ledger.judge(lambda slot: blocks[self._ledger.offsets[slot]]))

    async def _write(self, client: NbdClient) -> None:
        loop = asyncio.get_running_loop()
        next_at = loop.time()
        batches = 0
        while not self._is_stopping:
            await self._issue(client, self._ledger.issue(BATCH_WRITES))
            batches += 1
            if batches % FLUSH_BATCHES == 0:
                await self._flush(client)
            # After a stall the rate is kept, not caught up: the link could not take the rest.
            next_at = max(next_at + self._pause_s, loop.time() - self._pause_s)
            await asyncio.sleep(max(0.0, next_at - loop.time()))
        await self._flush(client)

    async def _issue(self, client: NbdClient, writes: Sequence[Write]) -> None:
        self._unknown = list(writes)
        offsets, content = self._ledger.offsets, self._ledger.content

        async def one(write: Write) -> None:
            await client.write(offsets[write.slot], content(write))
            self._ledger.complete(write)
            self._unknown.remove(write)

        results = await asyncio.gather(*map(one, writes), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _flush(self, client: NbdClient) -> None:
        moment = self._ledger.begin_flush()
        await client.flush()
        self._ledger.confirm(moment)


class Writing:
    """A writer in the background, while it is entered."""

    def __init__(self, uri: str, ledger: Ledger, bytes_per_second: int) -> None:
        self.writer = Writer(uri, ledger, bytes_per_second)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Writing:
        self._task = asyncio.create_task(self.writer.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def stop(self) -> None:
        """End it in order, with a flush.

        :raises GeomirrorError: it had ended already, with this error.
        """
        assert self._task is not None
        self.writer.stop()
        await self._task

    async def refusal(self, timeout_s: float) -> GeomirrorError | None:
        """Wait until the server refuses to serve it; the error, None if it writes on."""
        assert self._task is not None
        done, _ = await asyncio.wait({self._task}, timeout=timeout_s)
        error = self._task.exception() if done else None
        if error is not None and not isinstance(error, GeomirrorError):
            raise error
        return error
