"""Circuits between two nodes in this process: real TLS connections, and links that are function
calls. Both dial directions, what hostile members try, links and peers that go away."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from geomirror.environment import SECOND
from geomirror.errors import (
    AuthError,
    LinkError,
    NotFoundError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from geomirror.limits import PRODUCTION
from geomirror.node.calls import Caller, MethodRegistry
from geomirror.node.service_calls import ServiceCalls
from geomirror.tunnel.authority_io import renew_own, revoke_node
from geomirror.tunnel.circuit_pieces import DATA, pack
from geomirror.tunnel.driver import CIRCUIT_PROTOCOL, JOIN_PROTOCOL, LINK_PROTOCOL
from geomirror.tunnel.join_io import renew_by_join
from geomirror.tunnel.tls_context_io import network_label
from tests.tunnel.network_kit import HOUR, Collect, Site, join_as, pair, token_of

LIMITS = replace(
    PRODUCTION,
    circuit_open_ns_max=2 * SECOND,
    circuit_connect_ns_max=1 * SECOND,
    circuit_orphan_ns_max=0,
    circuits_ungreeted_max=20,
)


class Links:
    """Calls between the registries of nodes; `dials` says whether this one made the link."""

    def __init__(self, name: str, clock: Any) -> None:
        self.name = name
        self.clock = clock
        self.others: dict[str, MethodRegistry] = {}
        self.endpoints: dict[str, str] = {}
        self.dials = True
        self.incarnation = b"first"
        self.is_up = True
        self.queued_bytes = 0
        self.rtts_ns: dict[str, int] = {}

    async def call(
        self, peer: str, method: str, parameters: dict[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        await asyncio.sleep(0)
        if peer not in self.others or not self.is_up:
            raise UnreachableError(f"no link to {peer}")
        return await self.others[peer].dispatch(Caller(self.name), method, parameters)

    def state(self, peer: str) -> Any:
        return SimpleNamespace(
            is_established=peer in self.others and self.is_up,
            rtt_ns=self.rtts_ns.get(peer, 1),
            since_ns=self.clock.now_ns() - SECOND,
            is_dialled=self.dials,
            endpoint=self.endpoints.get(peer, ""),
            incarnation=self.incarnation,
            last_error="cut",
            bytes_sent=0,
            queued_bytes=self.queued_bytes,
        )


class Member:
    """The part of a node that is about services."""

    def __init__(self, site: Site, root: Path) -> None:
        self.site = site
        self.name = site.state.node
        self.links = Links(self.name, site.clock)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.methods = MethodRegistry()
        context = SimpleNamespace(
            name=self.name,
            clock=site.clock,
            entropy=site.entropy,
            links=self.links,
            limits=LIMITS,
            emit=lambda kind, fields: self.events.append((kind, fields)),
        )
        path = root / f"{self.name}.json"
        self.calls = ServiceCalls(context, site.state, site.driver, path)  # type: ignore[arg-type]
        self.calls.register(self.methods)

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self.methods.dispatch(Caller(), method, parameters)

    async def forward(self, name: str = "echo") -> int:
        found = await self.ask("service.forward", name=name, port=0)
        return int(found["listen"].rpartition(":")[2])

    async def last_error(self) -> str:
        listed = await self.ask("service.list")
        (found,) = listed["forwards"]
        return str(found["last_error"])

    @property
    def open(self) -> int:
        return len(self.calls.desk.live())


def link(a: Member, b: Member) -> None:
    """`a` has dialled `b`."""
    for one, other in ((a, b), (b, a)):
        one.links.others[other.name] = other.methods
        one.links.endpoints[other.name] = other.site.endpoint
        one.links.dials = one is a
        one.calls.directory.link_up(other.name)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def two(root: Path, *, holder_dials: bool = False) -> AsyncIterator[tuple[Member, Member]]:
    """east-1 exposes an echo server to west-1."""
    async with pair(root) as (east_site, west_site):
        east, west = Member(east_site, root), Member(west_site, root)
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        link(*((east, west) if holder_dials else (west, east)))
        port = server.sockets[0].getsockname()[1]
        await east.ask("service.expose", name="echo", port=port)
        await until(lambda: west.calls.directory.holders("echo"))
        watching = [asyncio.ensure_future(m.calls.desk.watch()) for m in (east, west)]
        try:
            yield east, west
        finally:
            for task in watching:
                task.cancel()
            found = await asyncio.gather(*watching, return_exceptions=True)
            assert [each for each in found if not isinstance(each, asyncio.CancelledError)] == []
            await asyncio.gather(east.calls.stop(), west.calls.stop())
            server.close()
            await until(lambda: not east.open and not west.open)


async def ask(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    found = await reader.read()
    writer.close()
    return found


async def is_reset(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(10):
            await reader.read()
    except ConnectionResetError:
        return True
    return False


async def refused(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionResetError:
        return True
    found = await is_reset(reader)
    writer.close()
    return found


@pytest.mark.parametrize("holder_dials", [False, True])
async def test_it_does_not_matter_who_can_dial(tmp_path: Path, holder_dials: bool) -> None:
    async with two(tmp_path, holder_dials=holder_dials) as (east, west):
        port = await west.forward()
        data = bytes(range(256)) * 4000
        assert await asyncio.gather(*(ask(port, data) for _ in range(20))) == [data] * 20
        await until(lambda: not east.open and not west.open)
        listed = await west.ask("service.list")
        (found,) = listed["forwards"]
        assert (found["circuits"], found["reset"], found["refused"]) == (20, 0, 0)
        assert found["bytes_sent"] == found["bytes_received"] == 20 * len(data)


async def dial(source: Member, target: Member) -> tuple[Any, Collect]:
    transport, protocol = await source.site.driver.dial(
        target.name, target.site.endpoint, Collect, protocol=CIRCUIT_PROTOCOL
    )
    assert isinstance(protocol, Collect)
    return transport, protocol


async def open_circuit(source: Member, target: Member, number: bytes) -> dict[str, Any]:
    return await source.links.call(
        target.name,
        "circuit.open",
        {"service": "echo", "number": number.hex(), "is_dialling": True},
        5,
    )


async def test_a_number_is_good_once_and_only_for_whom_it_was_agreed(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        number = b"n" * 16
        await open_circuit(west, east, number)
        with pytest.raises(RefusedError):
            await open_circuit(west, east, number)
        first, echoed = await dial(west, east)
        first.write(number + pack(DATA, b"hello"))
        assert await echoed.wait(9) == pack(DATA, b"hello")
        for guess in (number, b"x" * 16):
            transport, protocol = await dial(west, east)
            transport.write(guess + pack(DATA, b"again"))
            await protocol.lost
            assert protocol.data == b""
        # What the protocol forbids resets the circuit that it is in.
        first.write(b"\x00\x00\x00\x07")
        await echoed.lost
        await until(lambda: not east.open)
        listed = await east.ask("service.list")
        assert "unknown kind 7" in listed["exposures"][0]["last_error"]


async def test_connections_that_say_nothing_are_bounded_and_ended(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        made = [await dial(west, east) for _ in range(LIMITS.circuits_ungreeted_max)]
        with pytest.raises(AuthError, match="are being opened already"):
            await dial(west, east)
        made[0][0].write(b"half")
        async with asyncio.timeout(10):
            await asyncio.gather(*(protocol.lost for _, protocol in made))
        port = await west.forward()
        assert await ask(port, b"x") == b"x", "others get through afterwards"


async def test_a_circuit_that_is_asked_for_and_not_dialled_is_given_up(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        await open_circuit(west, east, b"n" * 16)
        assert east.open == 1
        await until(lambda: east.open == 0)
        listed = await east.ask("service.list")
        assert "did not dial" in listed["exposures"][0]["last_error"]


async def test_a_stranger_and_an_unknown_name_reach_nothing(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols([CIRCUIT_PROTOCOL])
        host, _, port = east.site.endpoint.rpartition(":")
        label = network_label(east.site.state.authority_hash)
        reader, writer = await asyncio.open_connection(
            host, int(port), ssl=context, server_hostname=label
        )
        writer.write(b"n" * 16)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        await until(lambda: east.site.refusals)
        for name in ("smb", "../echo", "x" * 100_000):
            with pytest.raises(NotFoundError):
                await west.links.call(
                    *("east-1", "circuit.open"),
                    {"service": name, "number": "00" * 16, "is_dialling": True},
                    5,
                )
        for number in ("", "zz" * 16, "00" * 17, "00" * 15, "00" * 16 + "\n"):
            with pytest.raises(UsageError):
                await west.links.call(
                    *("east-1", "circuit.open"),
                    {"service": "echo", "number": number, "is_dialling": True},
                    5,
                )
        for names in (["a b"], ["x"] * 300, [7]):
            with pytest.raises(UsageError):
                await west.links.call("east-1", "service.announce", {"services": names}, 5)
        for method in ("service.expose", "service.list", "service.forward"):
            with pytest.raises(RefusedError):
                await west.links.call("east-1", method, {}, 5)
        assert [kind for kind, _ in east.events].count("circuit_refused") == 3


async def test_a_version_without_services_is_told_apart(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        # As the version before: other methods, and another list of protocols.
        west.methods = east.links.others["west-1"] = MethodRegistry()
        west.site.driver.server.set_alpn_protocols([LINK_PROTOCOL, JOIN_PROTOCOL])
        east.calls.directory.link_up("west-1")
        await until(lambda: east.calls.directory.strangers() == ["west-1"])
        listed = await east.ask("service.list")
        assert listed["older_nodes"] == ["west-1"]
        with pytest.raises(LinkError, match="does not speak geomirror-circuit/1"):
            await dial(east, west)


async def test_circuits_end_with_a_reset_when_link_or_peer_are_gone(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        port = await west.forward()

        async def cut() -> None:
            west.links.is_up = False

        async def restart() -> None:
            west.links.incarnation = b"second"

        async def unexpose() -> None:
            await east.ask("service.unexpose", name="echo")

        for what in (cut, restart, unexpose):
            west.links.is_up = True
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"x")
            assert await reader.read(1) == b"x"
            await what()
            assert await is_reset(reader), what.__name__
            writer.close()
            await until(lambda: not west.open and not east.open)
        west.links.is_up = False
        assert await refused(port)
        await until(lambda: west.events[-1][0] == "circuit_failed")
        await until(lambda: not west.calls.directory.holders("echo"))


async def test_a_node_that_is_revoked_is_cut_off(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        port = await west.forward()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        revoke_node(east.site.state, "west-1", wall_ns=east.site.clock.wall_ns())
        assert east.site.driver.enforce() == ["west-1"]
        assert await is_reset(reader)
        writer.close()
        with pytest.raises(RefusedError, match="not a member"):
            await open_circuit(west, east, b"m" * 16)
        with pytest.raises(AuthError):
            await dial(west, east)


async def test_a_circuit_outlives_a_certificate_that_is_renewed_and_no_other(
    tmp_path: Path,
) -> None:
    async with two(tmp_path) as (east, west):
        port = await west.forward()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def is_alive() -> bool:
            for member in (east, west):
                member.site.driver.enforce()
            with contextlib.suppress(ConnectionError):
                writer.write(b"x")
                return await reader.read(1) == b"x"
            return False

        clock, entropy = east.site.clock, east.site.entropy
        clock.shift_ns = 13 * HOUR
        renew_own(east.site.state, wall_ns=clock.wall_ns(), entropy=entropy)
        await renew_by_join(west.site.state, clock=clock, entropy=west.site.entropy)
        clock.shift_ns = 24 * HOUR + 30 * SECOND
        assert await is_alive(), "the link may still be made anew"
        # The link, as it is made with the new certificates.
        transport, protocol = await west.site.driver.dial("east-1", east.site.endpoint, Collect)
        transport.abort()
        await protocol.lost
        clock.shift_ns = 30 * HOUR
        assert await is_alive()
        clock.shift_ns = 40 * HOUR
        assert not await is_alive()
        writer.close()


async def test_the_next_holder_is_asked_when_the_nearest_has_it_no_more(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        port = await west.forward()
        listed = await west.ask("service.list")
        assert listed["services"][0]["nearest"] == "east-1"
        # It goes without a word: the list here is out of date.
        east.calls.directory.changed = lambda: None  # type: ignore[method-assign]
        await east.ask("service.unexpose", name="echo")
        assert await refused(port)
        assert "no service" in await west.last_error()
        assert west.calls.directory.holders("echo") == []
        assert await refused(port)
        assert "no other node is known" in await west.last_error()


async def test_each_connection_goes_to_the_nearest_holder_that_answers(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        clock = east.site.clock
        site = await join_as(tmp_path / "north", token_of(east.site, "north-1"), clock)
        await site.start()
        north = Member(site, tmp_path)
        west.site.state.apply_updates(north.site.state.export_updates())
        link(west, north)
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port_there = server.sockets[0].getsockname()[1]
        await north.ask("service.expose", name="echo", port=port_there)
        await until(lambda: len(west.calls.directory.holders("echo")) == 2)
        west.links.rtts_ns = {"east-1": 20, "north-1": 10}

        async def taken() -> dict[str, int]:
            found = {}
            for member in (east, north):
                (counts,) = (await member.ask("service.list"))["exposures"]
                found[member.name] = counts["circuits"]
            return found

        port = await west.forward()
        assert (await west.ask("service.list"))["forwards"][0]["nearest"] == "north-1"
        assert await ask(port, b"x") == b"x"
        assert await taken() == {"east-1": 0, "north-1": 1}
        # The service of the nearest one is down: the next one is asked.
        server.close()
        await server.wait_closed()
        assert await ask(port, b"y") == b"y"
        assert await taken() == {"east-1": 1, "north-1": 1}
        assert (await west.ask("service.list"))["forwards"][0]["last_error"] == ""
        # Only to that one, if it was said so.
        pinned = await west.ask("service.forward", name="echo", port=0, node="north-1")
        assert await refused(int(pinned["listen"].rpartition(":")[2]))
        (_, found) = (await west.ask("service.list"))["forwards"]
        assert "Connection refused" in found["last_error"]
        await until(lambda: not west.open)
        await north.calls.stop()
        await site.stop()


async def test_rules_and_ports_are_there_after_a_restart(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        port = await west.forward()
        await west.calls.stop()
        taken = await asyncio.start_server(echo, "127.0.0.1", port)
        again = Member(west.site, tmp_path)
        link(again, east)
        await again.calls.start()
        listed = await again.ask("service.list")
        assert listed["forwards"][0]["error"]["code"] == "in_use"
        taken.close()
        await taken.wait_closed()
        keeping = asyncio.ensure_future(again.calls.listeners.keep())
        await until(lambda: again.calls.listeners.error_of(f"127.0.0.1:{port}") is None)
        await until(lambda: again.calls.directory.holders("echo"))
        assert await ask(port, b"back") == b"back"
        keeping.cancel()
        await again.calls.stop()


async def test_circuits_are_held_back_while_frames_wait(tmp_path: Path) -> None:
    async with two(tmp_path) as (_, west):
        port = await west.forward()
        pacing = asyncio.ensure_future(west.calls.pacer.keep())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        west.links.queued_bytes = 1
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        await until(west.calls.pacer.limits)
        (side,) = west.calls.desk.by_peer()["east-1"]
        listed = await west.ask("service.list")
        (limit,) = listed["held_back"]
        assert limit["node"] == "east-1"
        pace = side.peer.socket.getsockopt(socket.SOL_SOCKET, 47)
        assert 0 < pace <= limit["bytes_per_second"]
        west.links.queued_bytes = 0
        await until(lambda: not west.calls.pacer.limits())
        assert side.peer.socket.getsockopt(socket.SOL_SOCKET, 47) in (-1, 2**32 - 1)
        writer.close()
        pacing.cancel()
