"""Contexts of a primary's exports: flags, several at once, and what happens when it stops."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.environment import SystemClock, SystemEntropy
from geomirror.errors import FencedError, GeomirrorError, IntegrityError
from geomirror.limits import BLOCK_BYTES, PRODUCTION
from geomirror.nbd.constants import CMD_WRITE
from geomirror.nbd.protocol import Request
from geomirror.node.context import NodeContext
from geomirror.node.primary_export import HeldWriters, PrimaryExport
from geomirror.node.replica_runner import ReplicaRunner
from geomirror.node.status_contexts import (
    PEER_CONTEXT,
    PENDING_CONTEXT,
    UNSYNCED_CONTEXT,
    StatusContexts,
    encode_pieces,
)
from geomirror.volume.engine import Engine, VolumeSpec
from geomirror.volume.store_io import DirectoryStore
from geomirror.volume.superblock import GenerationRecord, PeerRecord
from geomirror.wan_protocol.primary import Primary

SIZE = 1 << 20
WEST, COLO = PEER_CONTEXT + "west", PEER_CONTEXT + "colo"
BLOCKS = st.integers(0, 40)


@given(
    st.dictionaries(BLOCKS, st.integers(0, 3), max_size=8),
    st.integers(0, 20 * BLOCK_BYTES),
    st.integers(1, 20 * BLOCK_BYTES),
    st.integers(1, 50),
)
def test_extents_say_of_every_byte_what_its_block_is(
    pieces: dict[int, int], offset: int, length: int, count_max: int
) -> None:
    end = offset + length
    first, stop = offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)
    pieces = {at: flags for at, flags in pieces.items() if first < at < stop} | {first: 0}
    starts = np.array(sorted(pieces), dtype=np.int64)
    flags = np.array([pieces[at] for at in sorted(pieces)], dtype=np.int64)
    extents = list(struct.iter_unpack(">II", encode_pieces(starts, flags, offset, end, count_max)))
    assert 1 <= len(extents) <= count_max
    assert all(size > 0 for size, _ in extents)
    described = sum(size for size, _ in extents)
    assert described == length or (described < length and len(extents) == count_max)
    assert all(a[1] != b[1] for a, b in itertools.pairwise(extents))
    at = offset
    for size, state in extents:
        for probe in (at, at + size - 1):
            block = max(start for start in pieces if start <= probe // BLOCK_BYTES)
            assert pieces[block] == state
        at += size


class Rig:
    """A primary of one volume, its runner, and one export."""

    def __init__(self, engine: Engine, executor: ThreadPoolExecutor, peers: Sequence[str]) -> None:
        clock = SystemClock()
        context = cast(Any, NodeContext)(
            name="a",
            site="a",
            data_dir=Path("/"),
            limits=PRODUCTION,
            clock=clock,
            entropy=SystemEntropy(),
            links=None,
            emit=lambda *_: None,
            executor=executor,
        )
        for peer in peers:
            engine.superblock.peers[peer] = PeerRecord()
        self.engine = engine
        self.core = Primary(
            engine,
            PRODUCTION,
            incarnation=bytes(16),
            peers=peers,
            now_ns=clock.now_ns(),
            wall_ns=clock.wall_ns(),
        )
        held = HeldWriters()
        self.runner = ReplicaRunner(
            self.core,
            "pg",
            context,
            on_room=held.retry,
            on_flush=lambda token, error: None,
            on_progress=lambda: None,
        )
        self.contexts = StatusContexts(self.runner, self.core)
        self.export = PrimaryExport("pg/0", 0, self.runner, held, self.contexts)
        self.handle = self.export.open(cast(Any, Sink()))

    def write(self, block: int) -> None:
        request = Request(CMD_WRITE, 0, 1, block * BLOCK_BYTES, 4, memoryview(b"data"))
        self.export.submit(self.handle, [request], cast(Any, Sink()))

    def ask(
        self, *names: str, offset: int = 0, length: int = SIZE, count_max: int = 100
    ) -> asyncio.Future[dict[str, list[tuple[int, int]]]]:
        answered = asyncio.get_running_loop().create_future()

        def answer(extents: Sequence[bytes], error: GeomirrorError | None) -> None:
            if error is not None:
                answered.set_exception(error)
                return
            told = [list(struct.iter_unpack(">II", each)) for each in extents]
            answered.set_result(dict(zip(names, told, strict=True)))

        self.export.describe(names, offset, length, count_max, answer)
        return answered


class Sink:
    is_closed = False

    def reply_many(self, cookies: list[int]) -> None:
        pass


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    engine = Engine.create(
        DirectoryStore(tmp_path),
        PRODUCTION,
        SystemEntropy(),
        name="pg",
        resource_id=bytes(16),
        volumes=[VolumeSpec(0, "0", SIZE)],
        journal_bytes=PRODUCTION.journal_bytes_min,
        role="primary",
        chain=[GenerationRecord(bytes(16).hex(), token=1, reason="created")],
        wall_ns=0,
    )
    with ThreadPoolExecutor(2) as executor:
        made = Rig(engine, executor, ["west", "colo"])
        yield made
        await made.runner.stop()
    engine.close()


async def test_names_follow_the_members(rig: Rig) -> None:
    assert rig.export.context_names() == [COLO, WEST, UNSYNCED_CONTEXT, PENDING_CONTEXT]
    rig.core.remove_peer("colo")
    assert rig.export.context_names() == [WEST, UNSYNCED_CONTEXT, PENDING_CONTEXT]
    rig.core.add_peer("north")
    assert PEER_CONTEXT + "north" in rig.export.context_names()


async def test_flags_of_all_contexts_in_one_answer(rig: Rig) -> None:
    rig.write(5)
    rig.core.seal_now(rig.runner.now_ns())
    rig.runner.drive()
    async with asyncio.timeout(10):
        while rig.engine.sealed_epoch < 1:
            await asyncio.sleep(0.001)
    rig.core.senders["west"].durable_epoch = 1
    rig.write(9)
    told = await rig.ask(WEST, COLO, UNSYNCED_CONTEXT, PENDING_CONTEXT)
    one, rest = BLOCK_BYTES, SIZE - 10 * BLOCK_BYTES
    both = [(5 * one, 0), (one, 1), (3 * one, 0), (one, 1), (rest, 0)]
    assert told[WEST] == [(9 * one, 0), (one, 1), (rest, 0)]
    assert told[COLO] == told[PENDING_CONTEXT] == both
    # West has block 5 already; nobody has block 9.
    assert told[UNSYNCED_CONTEXT] == [(5 * one, 0), (one, 1), (3 * one, 0), (one, 3), (rest, 0)]
    part = await rig.ask(COLO, offset=5 * one + 100, length=one, count_max=1)
    assert part[COLO] == [(one - 100, 1)]


async def test_a_member_that_goes_while_it_is_asked_for_lacks_everything(rig: Rig) -> None:
    first = rig.ask(WEST, UNSYNCED_CONTEXT)
    second = rig.ask(WEST, UNSYNCED_CONTEXT)
    rig.core.remove_peer("west")
    assert (await first)[WEST] == [(SIZE, 0)]
    assert await second == {WEST: [(SIZE, 1)], UNSYNCED_CONTEXT: [(SIZE, 0)]}
    rig.core.remove_peer("colo")
    # Nobody else has anything: it is all only here.
    assert await rig.ask(UNSYNCED_CONTEXT) == {UNSYNCED_CONTEXT: [(SIZE, 3)]}


async def test_questions_are_answered_in_order_and_all_of_them(rig: Rig) -> None:
    order: list[int] = []
    asked = [rig.ask(WEST, offset=at * BLOCK_BYTES, length=BLOCK_BYTES) for at in range(20)]
    for at, future in enumerate(asked):
        future.add_done_callback(lambda _, at=at: order.append(at))
    rig.write(3)
    answers = await asyncio.gather(*asked)
    assert order == list(range(20))
    flags = [answer[WEST][0][1] for answer in answers]
    assert flags == [int(at == 3) for at in range(20)]


async def test_a_fenced_or_stopped_resource_answers_so(rig: Rig) -> None:
    last = rig.ask(WEST)
    waiting = rig.ask(WEST)
    await rig.runner.stop()
    assert await last
    with pytest.raises(FencedError, match="stopping"):
        await waiting
    with pytest.raises(FencedError, match="stopping"):
        await rig.ask(WEST)


async def test_a_fenced_resource_says_why(rig: Rig) -> None:
    rig.core._fence(IntegrityError("the journal is damaged"))
    with pytest.raises(FencedError, match="the journal is damaged"):
        await rig.ask(WEST)


async def test_a_journal_that_cannot_be_read_is_an_error_and_no_clean_map(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.write(5)
    rig.core.seal_now(rig.runner.now_ns())
    rig.runner.drive()
    async with asyncio.timeout(10):
        while rig.engine.sealed_epoch < 1:
            await asyncio.sleep(0.001)

    def damaged(info: object) -> object:
        raise IntegrityError("a damaged record")

    with monkeypatch.context() as patch:
        patch.setattr(rig.engine, "table_of", damaged)
        with pytest.raises(IntegrityError, match="damaged record"):
            await rig.ask(WEST)
    assert (await rig.ask(WEST))[WEST][1] == (BLOCK_BYTES, 1)
