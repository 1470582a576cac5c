"""Real daemons: the primary is handed over, or killed under load and replaced.

Nothing that the promoted copy had is lost, the others follow by themselves, and a primary that
comes back knows that it is none any more.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geomirror.errors import GeomirrorError
from tests.system.support import MIB, Site, create, make_network, some_sites, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]
CHUNK = MIB // 4
Sites = tuple[Site, Site, Site]


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    """Three nodes; "pg" has its primary at the first and copies at both others."""
    with some_sites(tmp_path, "a", "b", "c") as (a, b, c):
        make_network(a, b, c)
        create(a, "pg", "--secondary", "north-1")
        until(lambda: streams(a, "west-1", "north-1"), what="both copies are there")
        yield a, b, c


def role(site: Site) -> Any:
    return site.status()["role"]


def streams(site: Site, *peers: str) -> bool:
    """Whether the primary streams to all of them, and they have everything."""
    found = {peer["node"]: peer for peer in site.status()["peers"]}
    good = ("Stream", "UpToDate")
    return all((found[n]["state"], found[n]["disk_state"]) == good for n in peers)


def is_gone(site: Site) -> bool:
    """Whether the primary does not answer this node any more."""
    found = site.call("failover.assess", name="pg", to="west-1")
    return not found["primary"]["is_reachable"]


def settled(site: Site) -> None:
    site.call("resource.wait", name="pg", kind="applied", timeout_s=60)


def same_everywhere(sites: Sites, offset: int, wanted: bytes) -> None:
    for site in sites:
        assert asyncio.run(site.read(offset, len(wanted))) == wanted, site.name


class Load(threading.Thread):
    """Writes numbered chunks to a node until that fails."""

    def __init__(self, site: Site) -> None:
        super().__init__(daemon=True)
        self.site = site
        self.completed = 0
        self.is_stopping = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.is_stopping:
                number = self.completed
                body = number.to_bytes(4, "big") * (CHUNK // 4)
                asyncio.run(self.site.write(number % 32 * CHUNK, body))
                self.completed += 1
        except (GeomirrorError, OSError, AssertionError) as error:
            self.error = error


def test_a_switchover_loses_nothing_and_goes_back(sites: Sites) -> None:
    a, b, c = sites
    asyncio.run(a.write(0, b"1" * CHUNK))
    dry = c.json("switchover", "pg", "--to", "west-1", "--dry-run")
    assert (dry["is_possible"], dry["is_dry_run"], dry["from"]) == (True, True, "east-1")
    assert role(a) == "primary"
    done = c.json("switchover", "pg", "--to", "west-1")
    assert (done["primary_now"], done["token"]) == ("west-1", 2)
    assert (role(a), role(b)) == ("secondary", "primary")
    asyncio.run(b.write(CHUNK, b"2" * CHUNK))
    until(lambda: streams(b, "east-1", "north-1"), what="both follow the new primary")
    settled(b)
    same_everywhere(sites, 0, b"1" * CHUNK + b"2" * CHUNK)
    assert {p["resyncs"] for p in b.status()["peers"]} == {0}
    with pytest.raises(GeomirrorError):
        asyncio.run(a.write(0, b"x" * CHUNK))

    text = b.run("switchover", "pg", "--to", "east-1")
    assert "east-1 is the primary now" in text
    assert "(token 3)" in text
    asyncio.run(a.write(0, b"3" * CHUNK))
    until(lambda: streams(a, "west-1", "north-1"))
    settled(a)
    same_everywhere(sites, 0, b"3" * CHUNK + b"2" * CHUNK)
    assert a.crashes() == b.crashes() == c.crashes() == []
    for site in sites:
        site.stop()
        site.restart()
    until(lambda: role(a) == "primary" and streams(a, "west-1", "north-1"))
    same_everywhere(sites, 0, b"3" * CHUNK + b"2" * CHUNK)


def test_the_primary_is_killed_under_load_and_replaced(sites: Sites) -> None:
    a, b, c = sites
    load = Load(a)
    load.start()
    until(lambda: load.completed >= 20)
    refused = b.error("failover", "pg", "--to", "west-1", "--yes", expected=5, code="refused")
    assert "geomirror switchover pg --to west-1" in refused
    a.kill()
    load.join(30)
    until(
        lambda: (
            not b.json("failover", "pg", "--to", "west-1", "--dry-run")["primary"]["is_reachable"]
        )
    )
    b.error("failover", "pg", "--to", "west-1", expected=2, code="usage")
    found = b.json("failover", "pg", "--to", "west-1", "--dry-run")
    heir, other = (b, c) if not found["more_advanced"] else (c, b)
    began = time.monotonic()
    done = heir.call("promotion.failover", name="pg", to=name_of(heir))
    asyncio.run(heir.write(60 * CHUNK, b"n" * CHUNK))
    first_write_s = time.monotonic() - began
    assert (done["token"], done["epoch"]) == (2, done["position"]["epoch"])
    assert first_write_s < 10  # A target of one second is for the benchmarks; here others run, too.

    # The image is the load up to some chunk, nothing else.
    chunks = [int.from_bytes(asyncio.run(heir.read(n * CHUNK, 4)), "big") for n in range(32)]
    last = max(chunks)
    assert last <= load.completed
    for slot in range(32):
        wanted = last - (last - slot) % 32
        assert chunks[slot] == max(wanted, 0)

    until(lambda: streams(heir, name_of(other)), what="the third node follows by itself")
    settled_other = until(lambda: other.status()["peers"][0]["node"] == name_of(heir))
    assert settled_other
    assert [p["resyncs"] for p in heir.status()["peers"] if p["node"] == name_of(other)] == [0]
    until(lambda: asyncio.run(other.read(60 * CHUNK, CHUNK)) == b"n" * CHUNK)

    # The old primary comes back with what nobody else has.
    a.restart()
    state = until(lambda: a.status()["state"] == "superseded" and a.status())
    assert "holds token 1 here" in state["reason"]
    with pytest.raises(GeomirrorError):
        asyncio.run(a.write(0, b"x" * CHUNK))
    a.stop()
    a.restart()
    state = until(lambda: a.status()["state"] == "superseded" and a.status())
    tail = state["superseded"]
    assert tail["relation"] == "diverged"
    assert tail["branch_epoch"] == done["epoch"]
    assert tail["next"] == f"geomirror resolve pg --keep {name_of(heir)}"

    # The operator chooses: the tail becomes a branch, and the node follows. Writers go on.
    load = Load(heir)
    load.start()
    until(lambda: load.completed >= 3)
    found = heir.json("resolve", "pg", "--keep", name_of(heir), "--yes")
    assert found["is_resolved"], found
    load.is_stopping = True
    load.join(30)
    assert load.error is None
    [given] = [member for member in found["members"] if member.get("tail")]
    assert given["node"] == "east-1"
    assert given["branch"].startswith("orphan-")
    until(lambda: streams(heir, "east-1", name_of(other)), what="all follow")
    settled(heir)
    same_everywhere(sites, 60 * CHUNK, b"n" * CHUNK)
    blocks = [asyncio.run(site.read(0, 32 * CHUNK)) for site in sites]
    assert blocks[0] == blocks[1] == blocks[2]
    assert a.crashes() == b.crashes() == c.crashes() == []


def name_of(site: Site) -> str:
    return {"a": "east-1", "b": "west-1", "c": "north-1"}[site.name]


def test_a_primary_that_was_cut_off_stops_at_first_contact(sites: Sites) -> None:
    a, b, _ = sites
    asyncio.run(a.write(0, b"1" * CHUNK))
    settled(a)
    assert a.process is not None
    a.process.send_signal(19)  # SIGSTOP: cut off, and alive.
    until(lambda: is_gone(b))
    until(lambda: b.json("failover", "pg", "--to", "west-1", "--yes")["token"] == 2)
    asyncio.run(b.write(0, b"2" * CHUNK))
    a.process.send_signal(18)
    state = until(lambda: role(a) == "secondary" or a.status()["state"] == "superseded")
    assert state
    # It had nothing of its own: it follows.
    until(lambda: streams(b, "east-1", "north-1"), what="all follow")
    settled(b)
    same_everywhere(sites, 0, b"2" * CHUNK)


def test_a_demoted_primary_can_be_promoted_anywhere(sites: Sites) -> None:
    a, b, c = sites
    asyncio.run(a.write(0, b"1" * CHUNK))
    done = a.json("demote", "pg")
    assert sorted(done["heirs"]) == ["north-1", "west-1"]
    assert [role(site) for site in sites] == ["secondary"] * 3
    found = c.json("failover", "pg", "--to", "east-1", "--yes")
    assert found["primary_now"] == "east-1"
    asyncio.run(a.write(0, b"2" * CHUNK))
    until(lambda: streams(a, "west-1", "north-1"))
    settled(a)
    same_everywhere(sites, 0, b"2" * CHUNK)
    assert a.crashes() == b.crashes() == c.crashes() == []
