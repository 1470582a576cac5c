"""Metadata contexts: which are listed and granted, and how their block status is answered."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.errors import FencedError, RefusedError, RemoteProtocolError
from geomirror.limits import PRODUCTION
from geomirror.nbd import constants as c
from geomirror.nbd.client_io import NbdClient
from geomirror.nbd.contexts import Answer, select, with_ids
from geomirror.nbd.negotiation import Negotiation, Phase
from geomirror.nbd.protocol import canonical_names
from geomirror.nbd.server_io import NbdServer
from geomirror.nbd.structured import encode_extents
from tests.nbd.context_export import ContextExport
from tests.nbd.test_nbd_negotiation import FLAGS, go, option, query, replies

BASE = "base:allocation"
WEST, COLO = "qemu:dirty-bitmap:unsynced-west", "qemu:dirty-bitmap:unsynced-colo"
UNSYNCED, PENDING = "x-geomirror:unsynced", "x-geomirror:pending"
OWN = [WEST, COLO, UNSYNCED, PENDING]
ALL = [BASE, *OWN]
SIZE = 1 << 20
STATES = {
    WEST: [(65536, 0), (4096, 1), (SIZE - 69632, 0)],
    COLO: [(SIZE, 1)],
    UNSYNCED: [(4096, 3), (4096, 1), (SIZE - 8192, 0)],
    PENDING: [(1, 1), (SIZE - 1, 0)],
}


def an_export(**more: object) -> ContextExport:
    return ContextExport(name="disk", size_bytes=SIZE, states=dict(STATES), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("queries", "listed", "granted"),
    [
        ([], ALL, []),
        ([BASE], [BASE], [BASE]),
        (["base:"], [BASE], []),
        (["qemu:"], [WEST, COLO], []),
        (["qemu:dirty-bitmap:"], [WEST, COLO], []),
        (["qemu:allocation-depth"], [], []),
        ([WEST], [WEST], [WEST]),
        (["x-geomirror:"], [UNSYNCED, PENDING], []),
        (["x-geomirror"], [], []),
        ([":"], [], []),
        ([""], [], []),
        ([PENDING, BASE, WEST, PENDING], [BASE, WEST, PENDING], [BASE, WEST, PENDING]),
        (["qemu:", COLO, "x-own:thing"], [WEST, COLO], [COLO]),
        (["qemu:dirty-bitmap:unsynced-"], [], []),
        (["qemu:dirty-bitmap:unsynced-wes"], [], []),
    ],
)
def test_wildcards_are_for_listing_and_names_are_exact(
    queries: list[str], listed: list[str], granted: list[str]
) -> None:
    assert select(ALL, queries, is_list=True) == listed
    assert select(ALL, queries, is_list=False) == granted


def negotiate(sent: bytes, step: int = 1 << 20) -> Negotiation:
    disk = an_export()
    exports = {"disk": disk}
    negotiation = Negotiation(exports.get, lambda: canonical_names(exports.items()), lambda e: None)
    held = b""
    for at in range(0, len(sent), step):
        held += sent[at : at + step]
        held = held[negotiation.receive(memoryview(held)) :]
    return negotiation


NAMES = st.one_of(
    st.sampled_from([*ALL, "base:", "qemu:", "qemu:dirty-bitmap:", "x-geomirror:", "x-own:a", ""]),
    st.text(max_size=40),
)


@given(
    st.lists(st.tuples(st.booleans(), st.lists(NAMES, max_size=8)), max_size=5), st.integers(1, 99)
)
def test_any_dialogue_grants_what_the_last_set_named(
    dialogue: list[tuple[bool, list[str]]], step: int
) -> None:
    sent, last = FLAGS + option(c.OPT_STRUCTURED_REPLY), []
    for is_set, queries in dialogue:
        kind = c.OPT_SET_META_CONTEXT if is_set else c.OPT_LIST_META_CONTEXT
        sent += option(kind, query("disk", *queries))
        last = queries if is_set else last
    negotiation = negotiate(sent + option(c.OPT_GO, go("disk")), step)
    assert negotiation.phase is Phase.TRANSMISSION
    assert list(negotiation.contexts) == [name for name in ALL if name in last]
    ids = list(negotiation.contexts.values())
    assert len(set(ids)) == len(ids)
    assert 0 not in ids
    # Each option's replies: contexts, then one ACK, and ids only where they mean something.
    found = [reply for reply in replies(negotiation) if reply[0] in (9, 10)]
    for is_set, queries in dialogue:
        wanted = select(ALL, queries, is_list=not is_set)
        numbers = with_ids(wanted) if is_set else dict.fromkeys(wanted, 0)
        for name in wanted:
            assert found.pop(0)[2] == struct.pack(">I", numbers[name]) + name.encode()
        assert found.pop(0)[1:] == (c.REP_ACK, b"")
    assert found == []


@given(st.binary(max_size=120), st.sampled_from([9, 10]))
def test_garbage_in_a_query_is_refused_and_grants_nothing(noise: bytes, kind: int) -> None:
    sent = FLAGS + option(c.OPT_STRUCTURED_REPLY)
    sent += option(c.OPT_SET_META_CONTEXT, query("disk", *ALL)) + option(kind, noise)
    with contextlib.suppress(RemoteProtocolError):
        negotiation = negotiate(sent)
        (last,) = [reply for reply in replies(negotiation) if reply[0] == kind][-1:]
        assert last[1] == c.REP_ACK or last[1] & c.REP_ERROR_BIT
        if kind == c.OPT_SET_META_CONTEXT:
            assert negotiation.contexts == {}


@contextlib.asynccontextmanager
async def serving(
    tmp_path: Path, disk: ContextExport, *contexts: str, **more: object
) -> AsyncIterator[NbdClient]:
    server = NbdServer(lambda: {"disk": disk})
    await server.start_unix(tmp_path / "s")
    uri = f"nbd+unix:///disk?socket={tmp_path / 's'}"
    try:
        async with await NbdClient.connect(uri, contexts=contexts, **more) as client:  # type: ignore[arg-type]
            yield client
    finally:
        await server.stop()


async def test_each_context_says_its_own(tmp_path: Path) -> None:
    disk = an_export()
    async with serving(tmp_path, disk, *ALL) as client:
        assert sorted(client.export.contexts.values()) == sorted(ALL)
        for name, expected in STATES.items():
            assert await client.block_status(0, SIZE, name) == expected
        hole = c.STATE_HOLE | c.STATE_ZERO
        assert await client.block_status(0, SIZE) == [(SIZE, hole)]
        # Any offset and length.
        assert await client.block_status(65535, 3, WEST) == [(1, 0), (2, 1)]
        assert await client.block_status(0, 1, PENDING) == [(1, 1)]
        assert await client.block_status(SIZE - 1, 1, COLO) == [(1, 1)]
    assert disk.asked[0] == (OWN, 0, SIZE, c.EXTENTS_MAX // 5)


async def test_one_extent_each_when_one_is_asked_for(tmp_path: Path) -> None:
    async with serving(tmp_path, an_export(), *ALL) as client:
        done = await client.start(c.CMD_BLOCK_STATUS, 4096, 8192, c.CMD_FLAG_REQ_ONE)
        told = {client.export.contexts[number]: extents for number, extents in done.extents.items()}
        assert told == {
            BASE: [(8192, 3)],
            WEST: [(8192, 0)],
            COLO: [(8192, 1)],
            UNSYNCED: [(4096, 1)],
            PENDING: [(8192, 0)],
        }


async def test_a_client_without_allocation_gets_only_what_it_set(tmp_path: Path) -> None:
    disk = an_export()
    async with serving(tmp_path, disk, COLO) as client:
        assert client.export.contexts == {2: COLO}
        done = await client.start(c.CMD_BLOCK_STATUS, 0, 10)
        assert done.extents == {2: [(10, 1)]}
        with pytest.raises(RefusedError):
            await client.block_status(0, 10, WEST)


async def test_an_answer_may_come_later_and_holds_up_nothing_else(tmp_path: Path) -> None:
    disk = an_export(is_slow=True)
    async with serving(tmp_path, disk, *ALL) as client:
        asked = [client.start(c.CMD_BLOCK_STATUS, at * 4096, 4096) for at in range(3)]
        await client.write(0, b"meanwhile")
        assert await client.read(0, 9) == b"meanwhile"
        assert not any(future.done() for future in asked)
        for _ in asked:
            # One at a time: the next is asked for when the one before is answered.
            assert len(disk.waiting) == 1
            disk.waiting.pop()()
            await asyncio.sleep(0)
        answers = await asyncio.gather(*asked)
        assert all(len(answer.extents) == len(ALL) for answer in answers)


async def test_an_error_is_an_answer_with_words(tmp_path: Path) -> None:
    disk = an_export(status_error=FencedError("stopped serving"))
    async with serving(tmp_path, disk, WEST) as client:
        asked = [client.start(c.CMD_BLOCK_STATUS, 0, 10) for _ in range(3000 // 64)]
        for future in asked:
            with pytest.raises(FencedError, match="stopped serving") as caught:
                await future
            assert caught.value.__cause__.errno == errno.ESHUTDOWN  # type: ignore[union-attr]
        disk.status_error = None
        assert await client.block_status(0, 10, WEST) == [(10, 0)]


async def test_a_client_that_goes_leaves_no_question_behind(tmp_path: Path) -> None:
    disk = an_export(is_slow=True)
    async with serving(tmp_path, disk, WEST) as client:
        asked = [client.start(c.CMD_BLOCK_STATUS, 0, 10) for _ in range(5)]
        await client.write(0, b"x")
        client.abort()
        await asyncio.gather(*asked, return_exceptions=True)
    assert disk.open_count == 0
    disk.waiting.pop()()
    assert disk.waiting == []
    assert len(disk.asked) == 1


@pytest.mark.parametrize("requests_max", [16, 4096])
async def test_a_client_that_takes_no_replies_gets_no_more_of_them(
    tmp_path: Path, requests_max: int
) -> None:
    disk = an_export()
    many = encode_extents([(1, at & 1) for at in range(c.EXTENTS_MAX)])
    asked_for: list[int] = []

    def describe(
        names: list[str], offset: int, length: int, extents_max: int, answer: Answer
    ) -> None:
        asked_for.append(extents_max)
        answer([many], None)

    disk.describe = describe  # type: ignore[method-assign, assignment]
    limits = replace(PRODUCTION, nbd_requests_max=requests_max)
    server = NbdServer(lambda: {"disk": disk}, limits=limits)
    await server.start_unix(tmp_path / "s")
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"), limit=1 << 16)
    sent = FLAGS + option(c.OPT_STRUCTURED_REPLY)
    sent += option(c.OPT_SET_META_CONTEXT, query("disk", WEST)) + option(c.OPT_GO, go("disk"))
    asked = 200
    head = struct.Struct(">IHHQQI")
    for cookie in range(asked):
        sent += head.pack(c.REQUEST_MAGIC, 0, c.CMD_BLOCK_STATUS, cookie, 0, SIZE)
    writer.write(sent)
    await writer.drain()
    for _ in range(1000):
        await asyncio.sleep(0)
    told = len(asked_for)
    # 64 MiB of replies may wait for it: 128 of half a MiB are too many.
    assert 0 < told < 100
    assert set(asked_for) == {c.EXTENTS_MAX}
    body = 4 + 8 * c.EXTENTS_MAX
    replied = await reader.readexactly(18 + 20 + 20 + 4 + len(WEST) + 20 + 20 + 12 + 20)
    assert replied.startswith(b"NBDMAGIC")
    for cookie in range(asked):
        answer = await reader.readexactly(20 + body)
        assert struct.unpack_from(">IHHQI", answer)[1:] == (1, c.REPLY_BLOCK_STATUS, cookie, body)
    writer.close()
    await writer.wait_closed()
    await server.stop()
