"""The causes of "no link", told apart: each is really there, and found by trying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from network_kit import HOUR, Site, free_endpoint, pair

from geomirror.environment import SECOND, SystemEntropy
from geomirror.errors import AuthError, LinkError, UnreachableError
from geomirror.tunnel.authority_io import revoke_node
from geomirror.tunnel.connect_proxy import parse_credentials
from geomirror.tunnel.diagnosis import (
    NEXT,
    Finding,
    PathFacts,
    Place,
    exit_code,
    judge_clock,
    judge_daemon,
    judge_own,
    judge_path,
    judge_peer,
    judge_udp,
)
from geomirror.tunnel.diagnosis_io import authority_skew_ns, try_path
from geomirror.tunnel.path_io import WayOut
from tests.ways_out import Gate, Inspector, Proxy, Server, self_signed


class Silent(Server):
    """Takes connections and says nothing."""

    def serve(self, sock) -> None:
        sock.recv(1 << 16)
        while sock.recv(1 << 16):
            pass


class Talker(Server):
    """Another program."""

    def serve(self, sock) -> None:
        sock.sendall(b"220 mail.example ESMTP\r\n")
        sock.recv(1 << 16)


def place(site: Site, peer: str = "east-1") -> Place:
    membership = site.state.membership
    return Place(
        peer=peer,
        config="/data/geomirror.toml",
        node=site.state.node,
        network=site.state.network,
        authority=site.state.authority_certificate,
        revoked=frozenset(
            m.node_id for m in membership.members() if membership.is_revoked(m.node_id)
        ),
    )


async def examine(
    source: Site, path: str, *, peer: str = "east-1", way_out: WayOut | None = None
) -> Finding:
    facts = await try_path(
        path, peer, source.state, way_out or WayOut(), source.clock, SystemEntropy()
    )
    return judge_path(facts, place(source, peer), source.clock.wall_ns())


def check(finding: Finding, code: str, *words: str) -> None:
    assert finding.code == code, finding
    assert finding.is_problem == (code != "ok")
    assert bool(finding.next) == (code != "ok") and "{" not in finding.next
    for word in words:
        assert word in finding.text, finding
    assert "\n" not in finding.text


async def test_a_way_that_works(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        check(await examine(west, east.endpoint), "ok", "direct TLS works")
        with Proxy({east.endpoint: int(east.endpoint[10:])}) as proxy:
            path = f"{east.endpoint} via {proxy.endpoint}"
            check(await examine(west, path), "ok", "through a proxy works")
        listener = await east.driver.listen("ws://127.0.0.1:0/gm", east.accept)
        check(await examine(west, f"ws://{listener.endpoint}/gm"), "ok", "WebSocket works")
        check(await examine(west, f"ws://{listener.endpoint}/other"), "websocket_refused", "404")
        await listener.stop()


async def test_names_ports_holes_and_other_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geomirror.tunnel.diagnosis_io.STAGE_SECONDS", 2.0)
    async with pair(tmp_path) as (east, west):
        check(await examine(west, "nowhere.invalid:7701"), "name_not_found", "nowhere.invalid")
        check(await examine(west, free_endpoint()), "refused", "nobody listens")
        with Gate(int(east.endpoint[10:])) as gate:
            check(await examine(west, gate.endpoint), "ok")
            gate.swallow()
            check(await examine(west, gate.endpoint), "black_hole", "packets vanish")
        with Silent() as silent:
            check(await examine(west, silent.endpoint), "black_hole", "says nothing")
        with Talker() as talker:
            check(await examine(west, talker.endpoint), "not_tls", "does not speak TLS 1.3")


async def test_what_a_proxy_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geomirror.tunnel.diagnosis_io.STAGE_SECONDS", 2.0)
    async with pair(tmp_path) as (east, west):
        port = int(east.endpoint[10:])
        with Proxy({east.endpoint: port}, credentials="me:s3cret") as proxy:
            path = f"{east.endpoint} via {proxy.endpoint}"
            check(await examine(west, path), "proxy_wants_credentials", "it offers basic")
            wrong = WayOut(parse_credentials(b"me:other", "f"))
            found = await examine(west, path, way_out=wrong)
            check(found, "proxy_wants_credentials", "does not take")
            right = WayOut(parse_credentials(b"me:s3cret", "f"))
            check(await examine(west, path, way_out=right), "ok")
            proxy.routes.clear()
            check(await examine(west, path, way_out=right), "proxy_refused", "(403)")
            proxy.routes[east.endpoint] = int(free_endpoint()[10:])
            check(await examine(west, path, way_out=right), "black_hole", "(502)")
            proxy.answer = b"nonsense\r\n\r\n"
            check(await examine(west, path, way_out=right), "proxy_broken")
            proxy.answer = b""
            check(await examine(west, path, way_out=right), "proxy_broken", "in time")
        check(await examine(west, path), "proxy_unreachable", "refuses the connection")
        path = f"{east.endpoint} via nowhere.invalid:3128"
        check(await examine(west, path), "proxy_not_found", "nowhere.invalid")


async def test_who_answers_is_another(tmp_path: Path) -> None:
    async with pair(tmp_path / "one") as (east, west), pair(tmp_path / "two") as (other, _):
        certificate = self_signed(tmp_path, "firewall.example")
        with Inspector(*certificate) as inspector:
            found = await examine(west, inspector.endpoint)
            check(found, "intercepted", "firewall.example", "opened on the way")
            assert "wss://" in found.next
        check(await examine(west, other.endpoint), "foreign_network", "another network")
        found = await examine(west, east.endpoint, peer="colo-1")
        check(found, "wrong_node", '"east-1" answers')
        revoke_node(east.state, "west-1", wall_ns=east.clock.wall_ns())
        found = await examine(west, east.endpoint)
        check(found, "certificate_revoked", "this node is revoked")
        west.state.apply_updates(east.state.export_updates())
        own = judge_own(west.state.claims, place(west), west.clock.wall_ns())
        check(own, "certificate_revoked")


async def test_clocks_and_dates(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        asked = ([east.endpoint], west.state, WayOut(), west.clock, SystemEntropy())
        skew_ns = await authority_skew_ns(*asked)
        assert skew_ns is not None and abs(skew_ns) < SECOND
        check(judge_clock(skew_ns, west.state.claims, place(west), west.clock.wall_ns()), "ok")

        west.clock = type(west.clock)()
        west.clock.shift_ns = 30 * HOUR
        ahead_ns = await authority_skew_ns(
            [free_endpoint(), east.endpoint], west.state, WayOut(), west.clock, SystemEntropy()
        )
        assert ahead_ns is not None and abs(ahead_ns - 30 * HOUR) < SECOND
        wall_ns = west.clock.wall_ns()
        found = judge_clock(ahead_ns, west.state.claims, place(west), wall_ns)
        check(found, "clock_skew", "ahead of the authority's")
        check(judge_own(west.state.claims, place(west), wall_ns), "certificate_expired")
        check(await examine(west, east.endpoint), "certificate_expired", "ended")

        west.clock.shift_ns = -HOUR
        wall_ns = west.clock.wall_ns()
        found = judge_clock(None, west.state.claims, place(west), wall_ns)
        check(found, "clock_skew", "before the beginning")
        check(await examine(west, east.endpoint), "certificate_not_yet_valid", "begins in")
        behind = await authority_skew_ns(
            [east.endpoint], west.state, WayOut(), west.clock, SystemEntropy()
        )
        found = judge_clock(behind, west.state.claims, place(west), wall_ns)
        check(found, "clock_skew", "3600 s behind the authority's")
        # A server that is not the authority is not asked for the time.
        assert await authority_skew_ns([west.endpoint], *asked[1:]) is None


async def test_what_the_peer_says_of_us(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):

        def said(words: str) -> Finding:
            facts = PathFacts(east.endpoint, "peer", detail=words)
            return judge_path(facts, place(west), west.clock.wall_ns())

        check(said('the certificate of "west-1" expired 5 s ago'), "certificate_expired")
        check(said('the certificate of "west-1" is valid only in 9 s'), "clock_skew")
        check(said("it is this node itself"), "not_accepted", "itself")
        assert '"west-1"' in said('the certificate of "west-1" expired 5 s ago').next

        problem = said("x")
        ok = Finding("ok", "x", "works")
        (notice, fine) = judge_peer([problem, ok], place(west), is_connected=None)
        assert not notice.is_problem and notice.next and fine == ok
        assert judge_peer([problem], place(west), is_connected=False) == [problem]
        assert judge_peer([], place(west), is_connected=True)[0].code == "ok"
        check(judge_peer([], place(west), is_connected=False)[0], "not_connected")
        udp = judge_udp("east-1", "connecting", place(west), is_connected=True)
        assert udp is not None
        check(udp, "udp_blocked", "no UDP")
        assert judge_udp("east-1", "connecting", place(west), is_connected=False) is None


def test_the_exit_code_is_that_of_the_gravest_problem() -> None:
    def code(*codes: str) -> int:
        return exit_code([Finding(code, "", "", is_problem=code != "ok") for code in codes])

    assert code("ok") == 0
    assert code("ok", "daemon_down") == UnreachableError.exit_code == 3
    assert code("daemon_down", "refused") == LinkError.exit_code == 11
    assert code("refused", "clock_skew", "daemon_down") == AuthError.exit_code == 10
    assert exit_code([replace(Finding("refused", "", ""), is_problem=False)]) == 0


def test_every_cause_has_a_next_step_and_a_sentence_in_the_documents() -> None:
    text = (Path(__file__).parent.parent.parent / "docs/overlay.md").read_text()
    missing: Sequence[str] = [code for code in NEXT if f"`{code}`" not in text]
    assert missing == []
    assert judge_daemon.__doc__
