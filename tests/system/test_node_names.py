"""Nodes that get another name, and nodes that leave; with real daemons."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.system.services import echo, knows, serving
from tests.system.support import Site, count_links, create, make_network, some_sites, until
from tests.system.trio import letters, put, streams, trio

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


def names(site: Site) -> list[str]:
    return [found["node"] for found in site.call("node.list")["nodes"]]


def test_a_renamed_node_is_linked_again_under_its_new_name(tmp_path: Path) -> None:
    with some_sites(tmp_path, "a", "b", "c") as (a, b, c), serving(echo) as server:
        make_network(a, b, c)
        b.run("expose", "echo", "--port", str(server.port))
        before = next(n for n in a.call("node.list")["nodes"] if n["node"] == "west-1")
        create(a, "pg", secondary="west-1")
        refused = a.error("node", "rename", "west-1", "west-9", expected=5, code="refused")
        assert 'member of the resource "pg"' in refused
        a.run("resource", "delete", "pg", "--yes")
        until(lambda: b.call("resource.list")["resources"] == [], what="b has forgotten")
        until(lambda: a.call("resource.list")["resources"] == [], what="a, too")
        taken = a.error("node", "rename", "west-1", "NORTH-1", expected=5, code="refused")
        assert 'already has a node named "north-1"' in taken
        a.error("node", "rename", "west-1", "no/name", expected=2, code="config")
        a.error("node", "rename", "nobody", "west-9", expected=4, code="not_found")
        refused = b.error("node", "rename", "west-1", "west-9", expected=5, code="refused")
        assert 'run this command on "east-1"' in refused
        assert '"west-1" is "west-9" now' in a.run("node", "rename", "west-1", "west-9")
        for site in (a, b, c):
            until(lambda site=site: count_links(site) == 2, what=f"links of {site.name}")
            assert names(site) == ["east-1", "north-1", "west-9"]
        after = next(n for n in a.call("node.list")["nodes"] if n["node"] == "west-9")
        for key in ("node_id", "address", "address_ipv6", "site"):
            assert after[key] == before[key]
        assert b.call("node.show")["node"] == b.call("status")["node"] == "west-9"
        # What goes by names goes by the new one: resources, and services, which go by keys.
        until(lambda: knows(c, "echo"), what="its service is known")
        create(a, "pg", secondary="west-9")
        until(lambda: streams(a, "west-9"), what="a copy under the new name")
        # The old name is free, and the authority's node may be renamed as well.
        assert b.stop() == 0
        b.restart()
        until(lambda: streams(a, "west-9"), what="b is back")
        a.run("resource", "delete", "pg", "--yes")
        until(lambda: b.call("resource.list")["resources"] == [])
        until(lambda: a.call("resource.list")["resources"] == [])
        a.run("node", "rename", "east-1", "hub")
        for site in (a, b, c):
            until(lambda site=site: count_links(site) == 2, what=f"links of {site.name}")
            assert names(site) == ["hub", "north-1", "west-9"]
        for site in (a, b, c):
            assert site.crashes() == [], site.name


def test_a_node_that_is_away_is_not_renamed(tmp_path: Path) -> None:
    with some_sites(tmp_path, "a", "b") as (a, b):
        make_network(a, b)
        b.stop()
        until(lambda: count_links(a) == 0)
        refused = a.error("node", "rename", "west-1", "west-9", expected=5, code="refused")
        assert "not connected" in refused
        assert names(a) == ["east-1", "west-1"]


def what_is_left(site: Site) -> set[str]:
    return set(os.listdir(site.data_dir))


def test_a_node_that_leaves_gives_its_copy_back_and_removes_itself(tmp_path: Path) -> None:
    with trio(tmp_path) as (a, b, c):
        put(a, 0, "1")
        refused = a.error("node", "leave", "--yes", expected=5, code="refused")
        assert "holds the key of the network authority" in refused
        assert a.error("node", "leave", "--yes", "--force", expected=5, code="refused") == refused
        (b.data_dir / "geomirror.toml").write_text("# mine\n")
        (b.data_dir / "notes").write_text("mine, too")
        assert "add --yes" in b.error("node", "leave", expected=2, code="usage")
        text = b.run("node", "leave", "--yes")
        assert '"west-1" has left the network "acme"' in text
        assert b.process is not None
        assert b.process.wait(15) == 0
        b.process = None
        assert what_is_left(b) == {"geomirror.toml", "notes", "audit.ndjson"}
        until(lambda: names(a) == names(c) == ["east-1", "north-1"], what="the others know")
        assert [(r["node"], r["has_left"]) for r in c.call("node.list")["revoked"]] == [
            ("west-1", True)
        ]
        assert [e["peer"] for e in c.events("node_left")] == ["west-1"]
        assert [p["node"] for p in a.status()["peers"]] == ["north-1"]
        put(a, 1, "2")
        until(lambda: letters(c, 2) == "12", what="replication goes on")
        assert [act["act"] for act in b.json("node", "audit")["acts"]] == [
            "network.join",
            "node.leave",
        ]
        # Nothing answers, nothing starts; the machine may join again under its old name.
        assert "no network yet" in b.failed_start(expected=4)
        token = a.set_up("token", "create", "--site", "west", "--node", "west-1").strip()
        b.set_up("join", token, "--listen", f"127.0.0.1:{b.port}")
        b.restart()
        until(lambda: count_links(b) == 2, what="it is back with another key")
        for site in (a, b, c):
            assert site.crashes() == [], site.name


def test_who_has_something_that_nobody_else_has_stays(tmp_path: Path) -> None:
    with some_sites(tmp_path, "a", "b", "c") as (a, b, c):
        make_network(a, b, c)
        create(b, "pg", primary="west-1", secondary="north-1")
        create(b, "solo", primary="west-1", secondary=None)
        until(lambda: streams(b, "north-1"))
        refused = b.error("node", "leave", "--yes", expected=5, code="refused")
        assert 'primary of "pg"; geomirror switchover pg --to north-1' in refused
        assert '--force: what of "pg" no other copy has yet; all of "solo"' in refused
        # The copy may be the only one when its primary is away.
        b.kill()
        until(lambda: count_links(c) == 1)
        refused = c.error("node", "leave", "--yes", expected=5, code="refused")
        assert 'the primary of "pg", west-1, is not connected' in refused
        a.stop()
        until(lambda: count_links(c) == 0)
        refused = c.error("node", "leave", "--yes", expected=5, code="refused")
        assert "east-1 is not connected: nobody could be told" in refused or "pg" in refused
        assert c.call("resource.list")["resources"] != []
        # Without a daemon only by force, and it says what it means.
        refused = b.error("node", "leave", "--yes", expected=5, code="refused")
        assert "does not run: nobody could be told" in refused
        text = b.run("node", "leave", "--yes", "--force")
        assert "geomirror node revoke west-1" in text
        assert what_is_left(b) == {"audit.ndjson"}
        a.restart()
        a.run("node", "revoke", "west-1", "--yes")
        assert "west-1" not in names(a)


@pytest.mark.parametrize("left", ["all", "no network", "nothing but the mark"])
def test_leaving_goes_on_after_a_crash_in_the_middle(tmp_path: Path, left: str) -> None:
    with some_sites(tmp_path, "a", "b") as (a, b):
        make_network(a, b)
        b.stop(signal.SIGKILL)
        mark = b.data_dir / "leaving.json"
        mark.write_text('{"network":"acme","node":"west-1","node_id":"x","is_told":true}')
        mark.chmod(0o600)
        if left != "all":
            for path in (b.data_dir / "network").iterdir():
                path.unlink()
        if left == "nothing but the mark":
            for path in (b.data_dir / "identity").iterdir():
                path.unlink()
        # Neither does it start again, nor is anything made where the rest will be removed.
        if left == "all":
            assert "node leave" in b.failed_start(expected=5)
        token = a.set_up("token", "create", "--site", "west", "--node", "west-2").strip()
        refused = b.error("join", token, expected=5, code="refused")
        assert "is leaving its network" in refused
        assert "has left" in b.run("node", "leave")
        assert what_is_left(b) <= {"audit.ndjson"}
        b.set_up("join", token, "--listen", f"127.0.0.1:{b.port}")
