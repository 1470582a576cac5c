"""Two nodes tell each other their keys and keep their hosts (models) as they should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from geomirror.config import TunnelConfig
from geomirror.environment import SECOND
from geomirror.errors import AuthError, GeomirrorError, LinkError, RefusedError
from geomirror.node import tunnel_host, tunnel_service
from geomirror.node.calls import Caller, MethodRegistry
from geomirror.node.tunnel_calls import TunnelCalls
from geomirror.node.tunnel_host import TunnelHost
from geomirror.node.tunnel_service import LOOK_S, RESTART_S, TunnelService
from geomirror.node.tunnel_store import ranges_of, tag_of
from geomirror.tunnel.addresses import HostRoute, parse_routes
from geomirror.tunnel.authority_io import rename_node, revoke_node
from geomirror.tunnel.token import Secret
from geomirror.tunnel.wireguard_actual import Actual
from geomirror.tunnel.wireguard_plan import Run, Start, Step
from tests.node.test_network_calls import Links
from tests.tunnel.network_kit import Site, join_as, pair, token_of
from tests.tunnel.tunnel_world import World

DAY_NS = 24 * 3600 * SECOND


class ModelHost:
    """What `TunnelHost` does, on a model."""

    is_kernel = False

    def __init__(self, service: TunnelService) -> None:
        self.world = World()
        self.done: list[Step] = []
        self.broken = ""
        """First part of the interfaces that cannot be started."""
        self.lacks = ""
        self._state = service.state

    def check(self) -> None:
        if self.lacks:
            raise RefusedError(self.lacks)

    async def look(self) -> Actual:
        return self.world.actual(tag_of(self._state), ranges_of(self._state))

    async def run(self, steps: Sequence[Step]) -> dict[str, str]:
        failures: dict[str, str] = {}
        for step in steps:
            if isinstance(step, Start) and self.broken and step.interface.startswith(self.broken):
                failures[step.interface] = "it does not start"
            if step.interface in failures:
                continue
            self.done.append(step)
            if isinstance(step, Run) and step.arguments[:2] == ("wg", "set"):
                self.world.devices[step.arguments[2]].peers.clear()
            else:
                self.world.do(step)
        return failures

    def remove_sockets(self) -> None:
        pass

    def pid_of(self, interface: str) -> int | None:
        return 1 if interface in self.world.devices else None

    async def stop(self) -> None:
        pass


class Member:
    """The part of a node that is about tunnels."""

    def __init__(self, site: Site, config: TunnelConfig) -> None:
        self.site, self.state = site, site.state
        self.links = Links(site.state.node)
        self.methods = MethodRegistry()
        self.events: list[tuple[str, dict[str, Any]]] = []
        context = SimpleNamespace(
            clock=site.clock,
            entropy=site.entropy,
            links=self.links,
            emit=lambda kind, fields: self.events.append((kind, fields)),
        )
        self.service = TunnelService(
            site.state,
            context,  # type: ignore[arg-type]
            config,
            lambda member: member.endpoints,
        )
        self.host = ModelHost(self.service)
        self.service.host = self.host  # type: ignore[assignment]
        TunnelCalls(self.service, site.entropy).register(self.methods)

    @property
    def world(self) -> World:
        return self.host.world

    async def settle(self) -> float:
        """Let calls end, then one pass; the pause after it."""
        while self.service._tasks:
            await asyncio.gather(*self.service._tasks)
        return await self.service._try_pass()

    async def ask(self, method: str) -> dict[str, Any]:
        return await self.methods.dispatch(Caller(), method, {})

    async def neighbour(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.ask("tunnel.status"))["neighbours"][0]
        return found


def connect(a: Member, b: Member) -> None:
    a.links.others[b.links.name] = b.methods
    b.links.others[a.links.name] = a.methods
    a.service.link_up(b.links.name)
    b.service.link_up(a.links.name)


ON = TunnelConfig(driver="wireguard")


@asynccontextmanager
async def two(
    root: Path, east: TunnelConfig = ON, west: TunnelConfig = ON
) -> AsyncIterator[tuple[Member, Member]]:
    async with pair(root) as sites:
        yield Member(sites[0], east), Member(sites[1], west)


@pytest.fixture(autouse=True)
def no_routes(monkeypatch: pytest.MonkeyPatch) -> list[HostRoute]:
    """The routes of the model's host, empty at first."""
    found: list[HostRoute] = []
    monkeypatch.setattr(tunnel_service, "host_routes", lambda: found)
    return found


async def test_keys_are_told_when_a_link_comes_up_and_both_hosts_fit(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        for member in (east, west):
            await member.settle()
            assert not member.world.devices
            assert (await member.neighbour())["state"] == "no_key"
        connect(east, west)
        for member in (east, west):
            await member.settle()
        (one,), (other,) = east.world.devices.values(), west.world.devices.values()
        (key, fields), (other_key, other_fields) = (
            next(iter(device.peers.items())) for device in (one, other)
        )
        assert fields[0] == other_fields[0]  # the pre-shared key
        assert key != other_key
        assert fields[1] == f"127.0.0.1:{other.port}"
        assert (await east.neighbour())["state"] == "connecting"
        fields[3:6] = [str(east.site.clock.wall_ns() // SECOND), "92", "92"]
        assert (await east.neighbour())["state"] == "up"
        assert east.events[0][0] == "tunnel_up"


async def test_on_a_host_that_is_as_it_should_be_nothing_is_done(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        connect(east, west)
        await east.settle()
        (device,) = east.world.devices.values()
        next(iter(device.peers.values()))[3] = str(east.site.clock.wall_ns() // SECOND)
        east.host.done.clear()
        assert await east.settle() == LOOK_S
        assert east.host.done == []


async def test_an_overdue_handshake_is_begun_anew_after_a_moment(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        connect(east, west)
        assert await east.settle() == RESTART_S
        assert await east.settle() < 1
        east.site.clock.shift_ns += SECOND
        east.host.done.clear()
        await east.settle()
        assert [step.arguments[:2] for step in east.host.done if isinstance(step, Run)] == [
            ("wg", "set"),
            ("wg", "syncconf"),
        ]
        (device,) = east.world.devices.values()
        assert len(device.peers) == 1


async def test_a_revoked_node_loses_its_tunnel_and_its_keys_are_forgotten(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        connect(east, west)
        await east.settle()
        assert len(east.world.devices) == 1
        revoke_node(east.state, "west-1", wall_ns=east.site.clock.wall_ns())
        east.service.members_changed()
        await east.settle()
        assert not east.world.devices
        assert (await east.ask("tunnel.status"))["neighbours"] == []
        stored = (east.state.data_dir / "tunnel/wireguard.json").read_text()
        assert west.state.identity.node_id not in stored
        with pytest.raises(RefusedError, match="not a member"):
            await east.methods.dispatch(
                Caller("west-1"),
                "tunnel.exchange",
                {"record": await west.service._own_record(east.state.identity.node_id)},
            )


async def test_a_node_that_shows_no_certificate_for_a_day_is_out(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        connect(east, west)
        await east.settle()
        east.links.others.clear()
        east.site.clock.shift_ns += DAY_NS
        await east.settle()
        assert not east.world.devices
        # It comes back, and is confirmed by that.
        connect(east, west)
        await east.settle()
        assert len(east.world.devices) == 1


async def test_while_links_are_up_keys_are_confirmed_every_hour(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        connect(east, west)
        for _ in range(30):
            await east.settle()
            east.site.clock.shift_ns += DAY_NS // 24 + SECOND
        await east.settle()
        assert len(east.world.devices) == 1


async def test_a_node_without_tunnels_or_of_an_older_version_is_named(tmp_path: Path) -> None:
    async with two(tmp_path, west=TunnelConfig()) as (east, west):
        connect(east, west)
        await east.settle()
        found = await east.neighbour()
        assert (found["state"], found["reason"]) == ("no_key", 'the node "west-1" has no tunnel')
        assert await west.settle() == LOOK_S
        assert not (west.state.data_dir / "tunnel").exists()
        assert (await west.ask("tunnel.status"))["state"] == "down"
        east.links.others["west-1"] = MethodRegistry()
        east.service.link_up("west-1")
        await east.settle()
        assert (await east.neighbour())["reason"] == "it runs a version without tunnels"
        # Later it has some, and tells.
        east.links.others["west-1"] = west.methods
        await west.ask("tunnel.up")
        await west.settle()
        await east.settle()
        assert len(east.world.devices) == len(west.world.devices) == 1


async def test_up_and_down_and_what_stays(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    config = TunnelConfig(hosts_file=str(hosts))
    async with two(tmp_path, east=config) as (east, west):
        connect(east, west)
        assert (await east.ask("tunnel.up"))["state"] == "up"
        await east.settle()
        assert "west-1.acme.internal" in hosts.read_text()
        rename_node(east.state, "west-1", "far-1")
        await east.settle()
        assert "west-1.acme.internal" not in hosts.read_text()
        assert "far-1.acme.internal" in hosts.read_text()
        removed = (await east.ask("tunnel.down"))["removed"]
        assert len(removed) == 10  # interface, 2 addresses, 4 routes, 2 rules, names
        assert hosts.read_text() == "127.0.0.1 localhost\n"
        assert east.world == World()
        assert await east.settle() == LOOK_S
        assert east.world == World()
        kinds = [kind for kind, _ in east.events]
        assert kinds == ["tunnel_up", "tunnel_down"]


async def test_what_a_host_lacks_is_said_once_and_tried_again(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, _):
        east.host.lacks = "no wg here"
        for _ in range(3):
            await east.settle()
        assert east.events == [("tunnel_failed", {"reason": "no wg here"})]
        found = await east.ask("tunnel.status")
        assert (found["state"], found["reason"]) == ("failed", "no wg here")
        with pytest.raises(RefusedError):
            await east.ask("tunnel.up")
        east.host.lacks = ""
        await east.settle()
        assert (await east.ask("tunnel.status"))["state"] == "up"


async def test_one_tunnel_that_does_not_start_holds_up_no_other(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        token = token_of(east.site, "south-1")
        south = Member(await join_as(tmp_path / "south", token, east.site.clock), ON)
        connect(east, west)
        connect(east, south)
        await east.settle()
        assert len(east.world.devices) == 2
        name = (await east.neighbour())["interface"]
        del east.world.devices[name]
        east.host.broken = name
        await east.settle()
        found = await east.ask("tunnel.status")
        assert found["state"] == "up"
        states = {n["node"]: (n["state"], n["reason"]) for n in found["neighbours"]}
        assert states["south-1"] == ("down", "it does not start")
        assert states["west-1"][0] == "connecting"
        east.host.broken = ""
        await east.settle()
        assert len(east.world.devices) == 2


async def test_a_hosts_file_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    config = TunnelConfig(driver="wireguard", hosts_file=str(tmp_path / "nowhere/hosts"))
    async with two(tmp_path, east=config) as (east, _):
        await east.settle()
        found = await east.ask("tunnel.status")
        assert found["state"] == "up"
        assert "nowhere/hosts" in found["warnings"][0]


async def test_networks_of_the_host_in_the_range_are_refused_wider_ones_told(
    tmp_path: Path, no_routes: list[HostRoute]
) -> None:
    async with two(tmp_path) as (east, _):
        head = "Iface\n"
        no_routes += parse_routes(head + "eth0\t0000000A\t0\t1\t0\t0\t0\t000000FF\n")
        await east.settle()
        found = await east.ask("tunnel.status")
        assert found["state"] == "up"
        assert "10.0.0.0/8 on eth0" in found["warnings"][0]
        no_routes += parse_routes(head + "eth1\t0005CB0A\t0\t1\t0\t0\t0\t00FFFFFF\n")
        await east.settle()
        found = await east.ask("tunnel.status")
        assert found["state"] == "failed"
        assert "10.203.5.0/24 on eth1" in found["reason"]


async def test_a_hostile_record_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, west):
        connect(east, west)
        await east.settle()
        before = east.world.copy()
        own = await east.service._own_record(west.state.identity.node_id)
        for record in ({}, {"public_key": "x"}, own, {**own, "port": 0}):
            with pytest.raises(AuthError):
                await east.methods.dispatch(Caller("west-1"), "tunnel.exchange", {"record": record})
        with pytest.raises(GeomirrorError):
            await east.methods.dispatch(Caller("west-1"), "tunnel.down", {})
        await east.settle()
        assert east.world.devices == before.devices


async def test_a_process_that_always_dies_is_started_ever_more_rarely(tmp_path: Path) -> None:
    async with two(tmp_path) as (east, _):
        pauses = []
        for _ in range(8):
            east.service._ended("gm1")
            pauses.append(east.service._ends["gm1"][1])
        assert pauses[0] == RESTART_S
        assert pauses == sorted(pauses)
        assert pauses[-1] == LOOK_S
        east.site.clock.shift_ns += 120 * SECOND
        east.service._ended("gm1")
        assert east.service._ends["gm1"][1] == RESTART_S


def test_a_host_without_root_or_tools_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    host = TunnelHost("gm000000-", lambda _: None)
    monkeypatch.setattr(tunnel_host.os, "geteuid", lambda: 1000)
    with pytest.raises(RefusedError, match="need root"):
        host.check()
    monkeypatch.setattr(tunnel_host.os, "geteuid", lambda: 0)
    monkeypatch.setattr(
        tunnel_host.shutil, "which", lambda name, path: None if name == "wg" else name
    )
    with pytest.raises(RefusedError, match="wg is not installed") as caught:
        host.check()
    assert "wireguard-tools" in caught.value.hint


async def test_a_tool_that_fails_is_quoted_unless_it_may_quote_a_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wg").write_text("#!/bin/sh\necho 'bad key `'$(cat)'`' >&2\nexit 1\n")
    (tmp_path / "ip").write_text("#!/bin/sh\necho 'no such device' >&2\nexit 2\n")
    for name in ("wg", "ip"):
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    host = TunnelHost("gm000000-", lambda _: None)
    steps = [Run(("wg", "syncconf", "gm1", "/dev/stdin"), "gm1", Secret(b"hidden words"))]
    failures = await host.run(steps)
    assert failures == {"gm1": "wg syncconf gm1 /dev/stdin: exit 1"}
    with pytest.raises(LinkError, match="no such device"):
        await host.run([Run(("ip", "rule", "add"))])
