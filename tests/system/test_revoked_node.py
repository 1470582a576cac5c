"""A node that is revoked: cut off everywhere within seconds, and what the others do then."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest

from tests.system.services import connect, echo, is_reset, is_turned_away, publish, serving
from tests.system.support import Site, create, make_network, some_sites, until, wait_applied
from tests.system.trio import letters, put, streams, trio

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

CUT_S_MAX = 5.0


def link(site: Site, peer: str) -> dict[str, object] | None:
    found = site.call("link.list")["links"]
    return next((each for each in found if each["node"] == peer), None)


def is_cut_off(site: Site) -> bool:
    """Whether a node has no link any more."""
    return not any(each["is_established"] for each in site.call("link.list")["links"])


def test_a_revoked_copy_is_cut_off_and_the_others_go_on(tmp_path: Path) -> None:
    with trio(tmp_path) as (a, b, c), serving(echo) as server:
        port = publish(c, b, "echo", server.port)
        put(a, 0, "1")
        wait_applied(a)
        sock = connect(port)
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"
        refused = a.error("node", "revoke", "east-1", "--yes", expected=5, code="refused")
        assert "holds the key of the authority" in refused
        refused = c.error("node", "revoke", "west-1", "--yes", expected=5, code="refused")
        assert 'run this command on "east-1"' in refused
        assert "add --yes" in a.error("node", "revoke", "west-1", expected=2, code="usage")
        assert streams(a, "west-1", "north-1")
        began = time.monotonic()
        text = a.set_up("node", "revoke", "west-1", "--yes")  # in this process: it is timed
        until(lambda: is_cut_off(b), CUT_S_MAX, what="west-1 has no link")
        until(lambda: link(c, "west-1") is None, CUT_S_MAX, what="north-1 does not know it")
        assert time.monotonic() - began < CUT_S_MAX
        assert '"west-1" is revoked' in text
        assert "told: north-1" in text
        assert "geomirror resource remove-secondary pg west-1" in text
        # Its circuit to north-1 ended with the links, and there is no other.
        assert is_reset(sock)
        sock.close()
        assert is_turned_away(port)
        # It keeps trying, and is told why it may not.
        said = 'the node "west-1" is revoked'
        until(lambda: said in str((link(b, "north-1") or {})["last_error"]), what="a refusal")
        assert 'the node "west-1" is revoked' in b.run("link", "list")
        refusals = c.events("connection_refused")
        assert any("revoked" in str(each["reason"]) for each in refusals)
        # Replication to the other copy goes on.
        put(a, 1, "2")
        until(lambda: streams(a, "north-1"), what="north-1 has everything")
        until(lambda: letters(c, 2) == "12", what="and shows it")
        text = a.run("status")
        assert "west-1 is not in the network any more" in text
        peer = a.peer(peer="west-1")
        assert (peer["is_member"], peer["state"]) == (False, "Disconnected")
        # Nobody forgets it: the authority and the copy start anew while it still tries.
        for site in (a, c):
            assert site.stop() == 0
            site.restart()
        until(lambda: streams(a, "north-1"), what="both are back")
        assert is_cut_off(b)
        assert link(c, "west-1") is None
        listed = c.json("node", "list")
        assert [n["node"] for n in listed["nodes"]] == ["east-1", "north-1"]
        assert [(r["node"], r["has_left"]) for r in listed["revoked"]] == [("west-1", False)]
        assert "west-1 was revoked" in c.run("network", "show")
        path = c.data_dir / "network" / "membership.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        # Taking it out of the resource waits for nobody.
        removed = a.json("resource", "remove-secondary", "pg", "west-1", "--yes")
        assert "west-1" not in removed["pending"]
        assert [p["node"] for p in a.status()["peers"]] == ["north-1"]
        acts = [(act["act"], act["result"]) for act in a.json("node", "audit")["acts"]]
        assert ("node.revoke", "failed") in acts
        assert ("node.revoke", "done") in acts
        assert ("resource.remove_secondary", "done") in acts
        no_secret_is_told((a, b, c))
        for site in (a, b, c):
            assert site.crashes() == [], site.name


def no_secret_is_told(sites: tuple[Site, ...]) -> None:
    """No private key is in a log, an audit log or the records."""
    for site in sites:
        pem = (site.data_dir / "identity" / "node.key").read_text()
        secret = pem.splitlines()[1]
        network = site.data_dir / "network"
        told = [site.log_path, site.data_dir / "audit.ndjson", *network.iterdir()]
        for path in told:
            assert secret not in path.read_text(), path


def test_a_node_that_was_away_learns_of_it_at_the_next_contact(tmp_path: Path) -> None:
    with some_sites(tmp_path, "a", "b", "c") as (a, b, c):
        make_network(a, b, c)
        c.stop()
        # Without a daemon, too: the others are told when it runs again.
        a.stop()
        found = a.json("node", "revoke", "west-1", "--yes")
        assert (found["told"], found["not_told"]) == ([], ["north-1"])
        assert not any(each["is_established"] for each in b.call("link.list")["links"])
        c.restart()
        until(lambda: link(c, "west-1")["is_established"], what="c does not know yet")  # type: ignore[index]
        a.restart()
        until(lambda: link(c, "west-1") is None, CUT_S_MAX, what="c was told")
        until(lambda: is_cut_off(b), CUT_S_MAX)
        # The machine may come back with another key, under the name that is free now.
        token = a.set_up("token", "create", "--site", "west", "--node", "west-1").strip()
        again = Site(tmp_path, "b2")
        again.set_up("join", token, "--listen", f"127.0.0.1:{again.port}")
        again.start()
        try:
            until(lambda: (link(a, "west-1") or {}).get("is_established"), what="the new one")
            until(lambda: (link(c, "west-1") or {}).get("is_established"), what="for c, too")
            assert is_cut_off(b)
        finally:
            again.end()
        assert c.crashes() == []


def test_the_copies_of_a_revoked_primary_say_how_to_go_on(tmp_path: Path) -> None:
    with some_sites(tmp_path, "a", "b", "c") as (a, b, c):
        make_network(a, b, c)
        create(b, "pg", primary="west-1", secondary="north-1")
        until(lambda: streams(b, "north-1"), what="the copy is there")
        put(b, 0, "1")
        wait_applied(b)
        until(lambda: c.status()["position"]["applied_epoch"] > 0)
        result = json.loads(a.run("node", "revoke", "west-1", "--yes", "--json"))
        assert result["resources"] == []  # the authority's node holds no part of it
        until(lambda: is_cut_off(b), CUT_S_MAX)
        text = c.run("status", "pg")
        assert "west-1, the primary, is not in the network any more" in text
        assert "geomirror failover pg --to north-1" in text
        c.run("failover", "pg", "--to", "north-1", "--yes")
        until(lambda: c.status()["role"] == "primary")
        put(c, 1, "2")
        assert letters(c, 2) == "12"
        assert "geomirror resource remove-secondary pg west-1" in c.run("status", "pg")
        c.run("resource", "remove-secondary", "pg", "west-1", "--yes")
        assert c.status()["peers"] == []
        # The revoked one may go on with itself; nobody hears of it.
        assert is_cut_off(b)
        for site in (a, b, c):
            assert site.crashes() == [], site.name
