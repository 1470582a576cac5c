"""A member with a valid certificate that sends what no honest node sends.

Its connection or session is closed with a typed error, memory stays bounded, nothing that the
victim holds changes, and the sessions of others go on.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zstandard

from geomirror.errors import (
    AuthError,
    IntegrityError,
    NotPrimaryError,
    RefusedError,
    SplitBrainError,
    UsageError,
)
from geomirror.limits import MIB
from geomirror.wan_protocol.frame import KIND_FRAME, KIND_MESSAGE, pack_header
from geomirror.wan_protocol.messages import (
    Acknowledge,
    Call,
    EpochCommit,
    Message,
    Reply,
    SessionOpen,
    SessionRefuse,
    encode_message,
)
from geomirror.wan_protocol.negotiation import make_hello
from tests.system.hostile import HostilePeer, frame_body
from tests.system.support import Site, create, make_network, some_sites, wait_applied

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
DATA = random.Random(1).randbytes(MIB)
BLOCK = random.Random(2).randbytes(4096)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Site, Site]]:
    """`a` is dead and will be impersonated; `b` follows it in pg, and `c` in other."""
    with some_sites(tmp_path_factory.mktemp("three"), "a", "b", "c") as (a, b, c):
        make_network(a, b, c)
        create(a, "pg")
        create(a, "other", primary="north-1")
        for site, name in ((a, "pg"), (c, "other")):
            asyncio.run(site.write(0, DATA, name))
            wait_applied(site, name)
        a.stop()
        yield a, b, c
        check_that_replication_goes_on(a, b)


def check_that_replication_goes_on(a: Site, b: Site) -> None:
    """The real node comes back, and the stream goes on where it was."""
    a.restart()
    asyncio.run(a.write(MIB, DATA))
    wait_applied(a)
    assert asyncio.run(b.read(0, 2 * MIB)) == DATA + DATA
    assert (a.peer()["resyncs"], a.peer()["disk_state"]) == (0, "UpToDate")


@pytest.fixture
def victim(three: tuple[Site, Site, Site]) -> Iterator[Site]:
    """Checks after each attack that nothing changed at the victim."""
    _, b, c = three
    before = b.status()
    memory_bytes = b.rss_bytes()
    yield b
    after = b.status()
    for key in ("position", "generation", "volumes"):
        assert after[key] == before[key], key
    assert after["disk_state"] in ("Consistent", "UpToDate")
    assert asyncio.run(b.read(0, MIB)) == DATA
    asyncio.run(c.write(0, DATA, "other"))
    wait_applied(c, "other", timeout_s=20)
    assert c.peer("other")["resyncs"] == 0
    # A busy machine may lose a link by silence, but nobody else is blamed.
    blamed = [e["reason"] for e in b.events("link_down") if e["peer"] == "north-1"]
    assert not any("protocol" in reason for reason in blamed)
    assert b.rss_bytes() - memory_bytes < 64 * MIB
    assert b.crashes() == []


def impersonate(three: tuple[Site, Site, Site]) -> HostilePeer:
    a, b, _ = three
    return HostilePeer(a.data_dir, "west-1", b.port)


async def expect_logged(site: Site, text: str, start: int) -> None:
    """The reason is in the log, as one line, typed and without a traceback."""
    async with asyncio.timeout(10):
        while text not in site.log()[start:]:
            await asyncio.sleep(0.02)


def array(*values: object) -> bytes:
    return msgspec.msgpack.encode(list(values))


def packet(kind: int, body: bytes, announced: int | None = None) -> bytes:
    return pack_header(kind, len(body) if announced is None else announced) + body


HELLO = make_hello("east-1", bytes(16), bytes(16), -1, 0, b"")


def said(message: Message) -> bytes:
    return packet(KIND_MESSAGE, encode_message(message))


LINK_ATTACKS: dict[str, tuple[str, bytes, str]] = {
    "message length bomb": ("control", packet(KIND_MESSAGE, b"", 2**32 - 1), "4294967295 bytes"),
    "frame length bomb": ("data", packet(KIND_FRAME, b"", 2**31), "2147483648 bytes"),
    "unknown type": ("control", packet(9, b"x"), "unknown type 9"),
    "garbage": ("data", os.urandom(4096), "protocol error"),
    "plain HTTP": ("control", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3, "not a packet"),
    "nested message": ("control", packet(KIND_MESSAGE, b"\x91" * 100_000), "refused"),
    "huge array": ("control", packet(KIND_MESSAGE, b"\xdd\xff\xff\xff\xff"), "refused"),
    "unknown tag": ("control", packet(KIND_MESSAGE, array("Nonsense", 1)), "refused"),
    "wrong field": ("control", packet(KIND_MESSAGE, array("Ping", "x")), "refused"),
    "empty message": ("control", packet(KIND_MESSAGE, b""), "refused"),
    "second hello": ("control", said(HELLO), "a second hello"),
    "message among data": ("data", said(HELLO), "on a data connection"),
    "frame among messages": ("control", packet(KIND_FRAME, b"x"), "on a control connection"),
    "call without JSON": ("control", said(Call(1, "x", b"[" * 50_000)), "protocol error"),
}


@pytest.mark.parametrize("name", LINK_ATTACKS)
async def test_on_the_link(three, victim: Site, name: str):
    where, attack, reason = LINK_ATTACKS[name]
    start = len(victim.log())
    async with impersonate(three) as peer:
        wire = peer.control if where == "control" else peer.data
        wire.raw(attack)
        await wire.expect_close()
    await expect_logged(victim, reason, start)
    await expect_logged(victim, "link_connection_refused", start)


def data_frame(volume: int = 0, block: int = 0, **changed: int) -> bytes:
    return frame_body([(volume, 0, 0, 1, block)], BLOCK, **changed)


FRAME_ATTACKS: dict[str, tuple[bytes, str]] = {
    "raw length": (data_frame(raw_bytes=2**31), "2147483648 bytes of data"),
    "entries": (data_frame(count=65535), "65535 entries"),
    "more entries than bytes": (data_frame(count=900), "900 entries"),
    "codec": (data_frame(codec=9), "codec 9"),
    "prefix": (data_frame(codec=2), "codec 2"),
    "flags": (data_frame(flags=1), "flags 1"),
    "empty": (b"", "no header"),
    "volume": (data_frame(volume=7), "volume 7"),
    "block": (data_frame(block=1 << 40), "names blocks"),
    "zero run": (frame_body([(0, 1, 0, 2**32 - 1, 0)], b""), "names blocks"),
    "kind": (frame_body([(0, 4, 0, 1, 0)], BLOCK), "kind 4"),
    "size": (frame_body([(0, 3, 0, 0, 1 << 60)], b""), "names a volume 0 of"),
    "odd size": (frame_body([(0, 3, 0, 0, 100)], b""), "names a volume 0 of 100"),
    "sizes": (frame_body([(1, 3, 0, 0, 4096), (0, 3, 0, 0, 4096)], b""), "volume 0 after 1"),
    "order": (frame_body([(0, 0, 0, 1, 5), (0, 0, 0, 1, 4)], BLOCK * 2), "not ascending"),
    "zeros": (frame_body([(0, 0, 0, 1, 0)], bytes(4096)), "zeros as data"),
    "too little": (frame_body([(0, 0, 0, 2, 0)], BLOCK), "its entries 8192"),
    "too much": (frame_body([(0, 0, 0, 1, 0)], BLOCK * 2), "bytes of data"),
}


async def test_frames_that_close_the_connection(three, victim: Site):
    for attack, reason in FRAME_ATTACKS.values():
        start = len(victim.log())
        async with impersonate(three) as peer:
            accept = await peer.open_session("pg")
            peer.frame(accept.session, accept.durable_epoch + 1, 0, attack)
            await peer.data.expect_close()
        await expect_logged(victim, reason, start)


async def test_more_epochs_or_frames_than_there_can_be(three, victim: Site):
    for numbers, reason in (
        ([(1 << 40, 1 << 31)], "frame number"),
        ([(1 << 41, 0), *((number, 0) for number in range(5000, 7000))], "epochs under way"),
    ):
        start = len(victim.log())
        async with impersonate(three) as peer:
            accept = await peer.open_session("pg")
            for epoch, sequence in numbers:
                peer.frame(accept.session, epoch, sequence, data_frame(block=epoch % 1000))
            await peer.data.expect_close()
        await expect_logged(victim, reason, start)


def bomb(size: int, *, with_size: bool) -> Callable[[bytes], bytes]:
    """zstd data that grows to `size` bytes, whatever the frame announces."""
    compressor = zstandard.ZstdCompressor(write_content_size=with_size)
    made = compressor.compressobj(size=size if with_size else -1)
    zeros = bytes(MIB)
    data = b"".join(made.compress(zeros) for _ in range(size // MIB)) + made.flush()
    assert len(data) < 80_000
    return lambda _: data


async def test_decompression_bombs_stay_small_and_the_session_goes_on(three, victim: Site):
    before = victim.rss_bytes()
    bombs = [
        data_frame(codec=1, encode=bomb(512 * MIB, with_size=True)),
        data_frame(codec=1, encode=bomb(512 * MIB, with_size=False)),
        data_frame(codec=1, encode=lambda _: os.urandom(3000)),
        data_frame(codec=1, encode=lambda _: b""),
        data_frame()[:-1] + b"?",
    ]
    async with impersonate(three) as peer:
        accept = await peer.open_session("pg")
        for sequence, body in enumerate(bombs * 20):
            peer.frame(accept.session, accept.durable_epoch + 1, sequence, body)
        # What follows is still taken: the connection is as good as before.
        answer = await peer.open_session("pg")
        assert answer.durable_epoch == accept.durable_epoch
        assert not peer.data.closed.is_set()
    assert victim.rss_bytes() - before < 64 * MIB
    assert victim.events("bad_frame")


def commit(peer: HostilePeer, epoch: int) -> EpochCommit:
    """Of one frame with one entry; the hash is wrong."""
    generation = bytes.fromhex(peer.superblock("pg").chain[-1].identity)
    return EpochCommit(
        session=peer.session_open("pg").session,
        epoch=epoch,
        first_epoch=epoch,
        generation=generation,
        first_lsn=1 << 27,
        end_lsn=1 << 28,
        wall_ns=1,
        frames=1,
        entries=1,
        raw_bytes=4096,
        chain_hash=b"\x01" * 32,
    )


async def test_an_epoch_that_is_not_what_its_commit_says_is_refused(three, victim: Site):
    async with impersonate(three) as peer:
        accept = await peer.open_session("pg")
        message = commit(peer, accept.durable_epoch + 1)
        # It is asked for once more before it is refused: frames of another cut may have been here.
        peer.frame(accept.session, message.epoch, 0, data_frame())
        peer.control.send(message, accept.session)
        asked = await peer.control.expect(Acknowledge)
        while asked.missing_epoch != message.epoch:
            asked = await peer.control.expect(Acknowledge)
        peer.frame(accept.session, message.epoch, 0, data_frame())
        peer.control.send(message, accept.session)
        refusal = await peer.control.expect(SessionRefuse)
        assert refusal.error_code == IntegrityError.wire_code
        assert f"epoch {message.epoch}" in refusal.error_text
    assert victim.status()["peers"][0]["state"] in ("Refused", "Disconnected")


async def test_commits_out_of_bounds_close_the_link(three, victim: Site):
    for changed in (
        {"frames": 1 << 31},
        {"entries": 1 << 40},
        {"epoch": -5, "first_epoch": -5},
        {"first_epoch": 0},
        {"end_lsn": 1 << 63},
        {"chain_hash": b""},
        {"generation": b"x"},
        {"table_hash": b"x" * 32},
    ):
        start = len(victim.log())
        async with impersonate(three) as peer:
            accept = await peer.open_session("pg")
            honest = commit(peer, accept.durable_epoch + 1)
            message = msgspec.structs.replace(honest, **changed)
            peer.control.send(message, accept.session)
            await peer.control.expect_close()
        await expect_logged(victim, "out of bounds", start)


async def test_replays_change_nothing(three, victim: Site):
    async with impersonate(three) as peer:
        accept = await peer.open_session("pg")
        for epoch in range(1, accept.durable_epoch + 1):
            for _ in range(3):
                peer.frame(accept.session, epoch, 0, data_frame())
                peer.control.send(commit(peer, epoch), accept.session)
        for _ in range(100):
            peer.frame(accept.session, accept.durable_epoch + 1, 0, data_frame())
        again = await peer.open_session("pg")
        assert (again.durable_epoch, again.durable_hash) == (
            accept.durable_epoch,
            accept.durable_hash,
        )
        assert not peer.control.closed.is_set()


async def test_messages_of_the_other_role_close_the_link(three, victim: Site):
    start = len(victim.log())
    async with impersonate(three) as peer:
        accept = await peer.open_session("pg")
        wrong = Acknowledge(accept.session, 9, 9, bytes(32), 9, 0, b"", 0, 1 << 60)
        peer.control.send(wrong, accept.session)
        await peer.control.expect_close()
    await expect_logged(victim, "sent Acknowledge to a secondary", start)


async def test_sessions_that_cannot_be_are_refused_with_the_reason(three, victim: Site):
    async with impersonate(three) as peer:
        honest = peer.session_open("pg")
        volumes = [msgspec.structs.replace(honest.volumes[0], size_bytes=32 * MIB)]
        chain = [msgspec.structs.replace(honest.chain[0], identity=b"?" * 16)]
        theirs = HostilePeer(victim.data_dir, "east-1", 1).session_open("other")
        for message, code, text in (
            (change(honest, volumes=volumes), RefusedError.wire_code, f"{32 * MIB}"),
            (change(honest, volumes=[]), RefusedError.wire_code, "differ"),
            (change(honest, chain=chain), SplitBrainError.wire_code, "another history"),
            (change(honest, resource=b"x" * 16), RefusedError.wire_code, "another identity"),
            (theirs, 5, "no resource"),
        ):
            peer.control.send(message, message.session)
            refusal = await peer.control.expect(SessionRefuse)
            assert (refusal.session, refusal.error_code) == (message.session, code), refusal
            assert text in refusal.error_text


def change(message: SessionOpen, **changed: object) -> SessionOpen:
    return msgspec.structs.replace(message, **changed)


async def test_calls_that_a_peer_may_not_make(three, victim: Site):
    show = victim.call("resource.show", name="other")["definition"]
    hijacked = {**show, "primary": "east-1", "secondaries": ["west-1"], "version": 99}
    foreign = {"name": "other", "resource_id": show["resource_id"], "keep_data": False}
    async with impersonate(three) as peer:
        for number, (method, parameters, kind) in enumerate(
            (
                ("nonsense", {}, UsageError),
                ("resource.list", {}, RefusedError),
                ("resource.forget", foreign, NotPrimaryError),
                ("resource.forget", {"name": 7}, UsageError),
                ("resource.define", {"definition": hijacked}, RefusedError),
                ("resource.define", {"definition": {**show, "name": "../x"}}, UsageError),
                ("resource.delete", {"name": "other"}, NotPrimaryError),
                ("resource.check_backing", {"paths": {"0": "x"}, "sizes": {}}, UsageError),
                ("certificate.renew", {"request": "x" * 10_000}, AuthError),
                ("membership.exchange", {"updates": [{"payload": 1}]}, AuthError),
            )
        ):
            peer.control.send(Call(number, method, msgspec.json.encode(parameters)))
            reply = await peer.control.expect(Reply)
            assert (reply.number, reply.error_code) == (number, kind.wire_code), reply
            assert reply.error_text
    assert [r["name"] for r in victim.call("resource.list")["resources"]] == ["other", "pg"]
