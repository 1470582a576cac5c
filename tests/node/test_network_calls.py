"""Members and certificates are exchanged over links; here the links are function calls."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from geomirror.environment import SECOND
from geomirror.errors import AuthError, LinkError, NoSpaceError, UsageError
from geomirror.node.calls import Caller, MethodRegistry
from geomirror.node.network_calls import NetworkCalls
from geomirror.node.sightings import shown_network
from geomirror.tunnel import network_state_io
from geomirror.tunnel.authority_io import revoke_node
from geomirror.tunnel.network_state_io import load_network
from tests.tunnel.network_kit import Site, join_as, pair, token_of

DAY_NS = 24 * 3600 * SECOND


class Links:
    """Calls between the registries of two sites."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.others: dict[str, MethodRegistry] = {}

    async def call(
        self, peer: str, method: str, parameters: dict[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        if peer not in self.others:
            raise LinkError(f"no link to {peer}")
        return await self.others[peer].dispatch(Caller(self.name), method, parameters)

    def state(self, peer: str) -> Any:
        return SimpleNamespace(
            is_established=peer in self.others,
            rtt_ns=40_000_000,
            since_ns=0,
            connections=4,
            congestion="bbr",
            bytes_sent=1,
            bytes_received=2,
            last_error="",
            trouble="",
            endpoint="127.0.0.1:1",
            rank=0,
            path_reason="",
        )


class Member:
    """The part of a node that is about the network."""

    def __init__(self, site: Site) -> None:
        self.state = site.state
        self.links = Links(site.state.node)
        self.methods = MethodRegistry()
        self.changes = 0
        context = SimpleNamespace(
            name=site.state.node, clock=site.clock, entropy=site.entropy, links=self.links
        )
        self.calls = NetworkCalls(site.state, context, self.changed)  # type: ignore[arg-type]
        self.calls.register(self.methods)

    def changed(self) -> None:
        self.changes += 1
        self.calls.spread.changed()

    async def ask(self, method: str) -> dict[str, Any]:
        return await self.methods.dispatch(Caller(), method, {})


def connect(a: Member, b: Member) -> None:
    a.links.others[b.links.name] = b.methods
    b.links.others[a.links.name] = a.methods


async def settle(member: Member) -> None:
    while member.calls.spread.tasks:
        await asyncio.wait(set(member.calls.spread.tasks))


async def test_a_third_member_is_learnt_when_the_link_comes_up(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east_site, west_site):
        south = await join_as(tmp_path / "south", token_of(east_site, "south-1"), west_site.clock)
        east, west = Member(east_site), Member(west_site)
        assert west.state.membership.find("south-1") is None
        connect(east, west)
        west.calls.link_up("east-1")
        await settle(west)
        assert west.state.membership.find("south-1") is not None
        assert west.changes == 1
        nodes = (await west.ask("node.list"))["nodes"]
        assert [(n["node"], n["is_self"], n["is_connected"]) for n in nodes] == [
            ("east-1", False, True),
            ("south-1", False, False),
            ("west-1", True, False),
        ]
        await south.stop()


async def test_an_exchange_that_brings_nothing_changes_nothing(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east_site, west_site):
        east, west = Member(east_site), Member(west_site)
        connect(east, west)
        for _ in range(2):
            west.calls.link_up("east-1")
            await settle(west)
        assert east.changes + west.changes <= 2


async def test_a_revocation_reaches_the_other_member(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east_site, west_site):
        south = await join_as(tmp_path / "south", token_of(east_site, "south-1"), west_site.clock)
        east, west = Member(east_site), Member(west_site)
        connect(east, west)
        revoke_node(east.state, "south-1", wall_ns=east_site.clock.wall_ns())
        east.calls.link_up("west-1")
        await settle(east)
        assert west.state.membership.is_revoked(south.state.identity.node_id)
        await south.stop()


async def test_a_revocation_is_passed_on_by_a_node_in_the_middle(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east_site, west_site):
        south_site = await join_as(
            tmp_path / "south", token_of(east_site, "south-1"), west_site.clock
        )
        lost = await join_as(tmp_path / "lost", token_of(east_site, "lost-1"), west_site.clock)
        members = east, west, south = Member(east_site), Member(west_site), Member(south_site)
        # east ── west ── south: the authority and south have no link.
        connect(east, west)
        connect(west, south)
        east.calls.link_up("west-1")
        west.calls.link_up("south-1")
        for member in (*members, *members):
            await settle(member)
        assert len({m.state.membership.fingerprint() for m in members}) == 1
        assert south.state.membership.find("lost-1") is not None
        revoke_node(east.state, "lost-1", wall_ns=east_site.clock.wall_ns())
        east.calls.spread.changed()
        for member in (*members, *members):
            await settle(member)
        for member in members:
            assert member.state.membership.is_revoked(lost.state.identity.node_id)
        told, untold = await west.calls.spread.settled(1)
        assert (told, untold) == (["south-1"], [])
        # It is on disk: a restart does not forget it, and a list from before does not replace it.
        path = south.state.membership_path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        again = load_network(tmp_path / "south")
        assert again.membership.is_revoked(lost.state.identity.node_id)
        before = lost.state.export_updates()
        assert again.apply_updates(before) is False
        assert again.membership.is_revoked(lost.state.identity.node_id)
        for site in (south_site, lost):
            await site.stop()


async def test_a_neighbour_whose_answer_is_nonsense_is_asked_again_later(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east_site, west_site):
        east, west = Member(east_site), Member(west_site)
        connect(east, west)
        answers: list[Any] = [7, [{"kind": "member"}], [{"kind": "x", "payload": 1}], None]

        async def nonsense(*_: Any) -> dict[str, Any]:
            return {"updates": answers.pop()}

        east.links.call = nonsense  # type: ignore[method-assign]
        before = east.state.export_updates()
        east.calls.link_up("west-1")
        await settle(east)
        assert (len(answers), east.state.export_updates()) == (3, before)
        assert (await east.calls.spread.settled(0.1))[1] == ["west-1"]
        await east.calls.stop()


async def test_records_that_a_full_disk_did_not_take_are_stored_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(tmp_path) as (east_site, west_site):
        west, member = west_site.state, Member(west_site)
        lost = await join_as(tmp_path / "lost", token_of(east_site, "lost-1"), west_site.clock)
        revoke_node(east_site.state, "lost-1", wall_ns=east_site.clock.wall_ns())
        updates = east_site.state.export_updates()

        def full(path: Path, data: bytes) -> None:
            raise NoSpaceError("no space")

        with monkeypatch.context() as patch:
            patch.setattr(network_state_io, "write_file", full)
            with pytest.raises(NoSpaceError):
                await member.methods.dispatch(
                    Caller("east-1"), "membership.exchange", {"updates": updates}
                )
        # In force all the same, and stored as soon as that is possible.
        node_id = lost.state.identity.node_id
        assert member.changes == 1
        assert west.membership.is_revoked(node_id)
        assert not load_network(tmp_path / "west").membership.is_revoked(node_id)
        west.apply_updates(updates)
        assert load_network(tmp_path / "west").membership.is_revoked(node_id)
        await lost.stop()


async def test_when_a_node_was_seen_last_survives_a_restart(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east_site, west_site):
        east, west = Member(east_site), Member(west_site)
        listed = (await east.ask("node.list"))["nodes"]
        assert [n["last_seen_at"] for n in listed] == [None, None]
        assert listed[0]["certificate_expires_at"] is not None  # its own
        connect(east, west)
        seen_at = (await east.ask("node.list"))["nodes"][1]["last_seen_at"]
        assert seen_at is not None
        east.links.others.clear()
        await east.calls.stop()
        again = shown_network(tmp_path / "east")["nodes"]
        assert [n["node"] for n in again if n["last_seen_at"]] == ["west-1"]
        (tmp_path / "east" / "network" / "seen.json").write_bytes(b'{"format": 7')
        assert [n["last_seen_at"] for n in shown_network(tmp_path / "east")["nodes"]] == [None] * 2


async def test_forged_entries_are_refused_and_change_nothing(tmp_path: Path) -> None:
    async with pair(tmp_path) as (_, west_site):
        west = Member(west_site)
        before = west.state.export_updates()
        forged = {**before[0], "signature": before[1]["signature"]}
        for updates in ([forged], [{"kind": "x"}], [{}]):
            with pytest.raises(AuthError):
                await west.methods.dispatch(
                    Caller("east-1"), "membership.exchange", {"updates": updates}
                )
        with pytest.raises(UsageError):
            await west.methods.dispatch(Caller("east-1"), "membership.exchange", {"updates": 7})
        assert west.state.export_updates() == before


async def test_certificates_are_renewed_at_half_their_life(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east_site, west_site):
        east, west = Member(east_site), Member(west_site)
        connect(east, west)
        for site in (east_site, west_site):
            assert not site.state.is_renewal_due(site.clock.wall_ns())
        west_site.clock.shift_ns += DAY_NS * 6 // 10
        for member, site in ((east, east_site), (west, west_site)):
            before = member.state.certificate
            assert member.state.is_renewal_due(site.clock.wall_ns())
            assert await member.calls._renew_own()
            assert member.state.certificate.serial_number != before.serial_number
            assert not member.state.is_renewal_due(site.clock.wall_ns())


async def test_an_expired_member_without_links_renews_at_the_join_endpoint(tmp_path: Path) -> None:
    async with pair(tmp_path) as (_, west_site):
        west = Member(west_site)
        west_site.clock.shift_ns += DAY_NS * 2
        assert await west.calls._renew_own()
        assert not west.state.is_renewal_due(west_site.clock.wall_ns())


async def test_without_any_authority_renewal_is_tried_again_later(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east_site, west_site):
        await east_site.stop()
        assert not await Member(west_site).calls._renew_own()


async def test_links_are_listed_with_their_numbers(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east_site, west_site):
        east, west = Member(east_site), Member(west_site)
        connect(east, west)
        (link,) = (await east.ask("link.list"))["links"]
        assert (link["node"], link["is_established"], link["rtt_seconds"]) == ("west-1", True, 0.04)
        assert (await west.ask("node.show"))["node"] == "west-1"
        assert (await west.ask("network.show"))["authority_nodes"] == ["east-1"]
