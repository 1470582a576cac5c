"""Real daemons: a laggard is cut off, confirmed writes go on without it, and the primary is lost.

Whoever is left says the truth about its copy: that it has everything, until when, or that confirmed
writes may be missing and why.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
        yield a, b, c


def sync(site: Site) -> Any:
    found = site.status()
    return found.get("sync") or {"in_sync": [], "out_of_sync": [], "mode": "", "as_of": ""}


def verdict(site: Site, to: str, *, expected: int = 0) -> Any:
    """What a node says about promoting a copy."""
    return site.json("failover", "pg", "--to", to, "--dry-run", expected=expected)


def confirmed(found: Any) -> tuple[str, str]:
    return found["confirmed_writes"]["verdict"], found["confirmed_writes"]["reason"]


def knows(site: Site, nodes: list[str]) -> bool:
    return bool(sync(site)["in_sync"] == nodes)


def freeze(site: Site) -> None:
    """Cut a node off: it neither hears nor says anything, and does not know that."""
    assert site.process is not None
    site.process.send_signal(signal.SIGSTOP)


def thaw(site: Site) -> None:
    assert site.process is not None
    os.kill(site.process.pid, signal.SIGCONT)


def test_the_laggard_is_known_to_the_others_when_the_primary_is_lost(sites: Sites) -> None:
    a, b, c = sites
    # Long enough for the link to be declared dead first: no word of it waits in b's kernel.
    a.run("resource", "set", "pg", "ack=durable", "degrade_after=6s")
    both = ["north-1", "west-1"]
    until(lambda: all(knows(site, both) for site in sites), what="everybody knows the set")
    asyncio.run(a.write(0, b"1" * CHUNK))
    freeze(b)
    # What comes now is more than the kernel takes for b: what is behind it dies with a.
    asyncio.run(a.write(CHUNK, random.Random(1).randbytes(24 * MIB)))
    asyncio.run(a.write(0, b"2" * CHUNK))  # Answered, without b.
    [degraded] = a.events("sync_degraded")
    assert degraded["peer"] == "west-1"
    # It was told before the write was answered.
    assert sync(c)["in_sync"] == ["north-1"]
    assert [one["node"] for one in sync(c)["out_of_sync"]] == ["west-1"]
    assert c.events("in_sync_changed")[-1]["out_of_sync"] == ["west-1"]
    text = c.run("status", "pg")
    assert "in sync: north-1; out of sync: west-1 since" in text

    # The primary is lost alone.
    a.kill()
    thaw(b)
    until(lambda: b.call("node.list") and any_link(b, "north-1"), what="b and c see each other")
    for site in (b, c):
        found = until(lambda site=site: answered(verdict(site, "north-1"), 2))
        assert confirmed(found) == ("complete_until", "in_sync")
        assert found["confirmed_writes"]["until"] >= degraded["time"][:19]
        assert not found["primary"]["is_reachable"]
        assert found["best"] is None
        found = verdict(site, "west-1")
        assert confirmed(found) == ("may_be_missing", "left_out")
        assert found["confirmed_writes"]["left_out"]["epoch"] == degraded["epoch"]
        assert (found["best"], found["more_advanced"]) == ("north-1", ["north-1"])
        assert found["loss"]["epochs"] >= 1
        assert found["loss"]["bytes"] >= CHUNK
    text = c.run("failover", "pg", "--to", "west-1", "--dry-run")
    assert "Confirmed writes may be missing: east-1 stopped waiting for west-1 at epoch" in text
    assert "north-1 has more: geomirror failover pg --to north-1 --dry-run" in text
    assert asyncio.run(c.read(0, CHUNK)) == b"2" * CHUNK
    assert asyncio.run(b.read(0, CHUNK)) == b"1" * CHUNK

    # The laggard alone: it cannot know, and says until when it does.
    c.kill()
    found = until(lambda: answered(verdict(b, "west-1"), 1))
    assert confirmed(found) == ("complete_until", "in_sync")
    assert found["confirmed_writes"]["until"] < degraded["time"]
    assert "unless east-1 stopped waiting for it after that" in found["confirmed_writes"]["text"]
    b.kill()
    b.restart()
    found = until(lambda: answered(verdict(b, "west-1"), 1))
    assert confirmed(found) == ("complete_until", "in_sync")
    assert found["confirmed_writes"]["until"] < degraded["time"]

    # Primary and laggard are lost together.
    b.kill()
    c.restart()
    found = until(lambda: answered(verdict(c, "north-1"), 1))
    assert confirmed(found) == ("complete_until", "in_sync")
    found = verdict(c, "west-1", expected=5)
    assert not found["is_possible"]
    assert found["refusal"]["reason"] == "no_answer"
    assert found["refusal"]["hint"] == "geomirror failover pg --to north-1 --dry-run"
    assert a.crashes() == b.crashes() == c.crashes() == []


def answered(found: Any, count: int) -> Any:
    """The verdict, once so many members answered."""
    return found if sum(m["is_reachable"] for m in found["members"]) == count else None


def any_link(site: Site, node: str) -> bool:
    links = site.call("link.list")["links"]
    return any(link["node"] == node and link["is_established"] for link in links)


def test_with_block_the_copy_that_is_left_has_everything(sites: Sites) -> None:
    a, b, c = sites
    a.run("resource", "set", "pg", "ack.west-1=durable", "degrade_after=block")
    until(lambda: all(knows(site, ["west-1"]) for site in sites), what="everybody knows the set")
    assert sync(b)["mode"] == "block"
    asyncio.run(a.write(0, b"1" * CHUNK))
    found = verdict(c, "west-1")
    assert confirmed(found) == ("complete", "block")
    assert found["primary"]["is_reachable"]
    said = verdict(a, "east-1", expected=5)["refusal"]
    assert (said["reason"], said["hint"]) == ("is_primary", "nothing has to be promoted")

    # The other copy is away: what it relies on does not end before it knows.
    b.kill()
    answer = a.json("resource", "set", "pg", "degrade_after=1s")
    assert answer["waits_for"] == ["west-1"]
    assert sync(a)["mode"] == "block"
    assert "relies on degrade_after=block" in a.run("status", "pg")
    b.restart()
    until(lambda: sync(a)["mode"] == "degrade" and sync(b)["mode"] == "degrade")
    a.run("resource", "set", "pg", "degrade_after=block")
    until(lambda: sync(b)["mode"] == "block")
    asyncio.run(a.write(0, b"2" * CHUNK))
    a.call("resource.wait", name="pg", kind="applied", timeout_s=60)

    a.kill()
    found = until(lambda: answered(verdict(c, "west-1"), 2))
    assert confirmed(found) == ("complete", "block")
    assert (found["loss"]["epochs"], found["loss"]["bytes"]) == (0, 0)
    text = b.run("failover", "pg", "--to", "west-1", "--dry-run")
    assert "west-1 has every confirmed write: east-1 confirms nothing without" in text
    assert "lost       nothing that is known here" in text
    assert confirmed(verdict(b, "north-1")) == ("asynchronous", "not_waited_for")
    assert asyncio.run(b.read(0, CHUNK)) == b"2" * CHUNK
    c.kill()
    found = until(lambda: answered(verdict(b, "west-1"), 1))
    assert confirmed(found) == ("complete", "block")
    refused = b.error("failover", "pg", "--to", "west-1", expected=2, code="usage")
    assert "needs confirmation" in refused
    unknown = b.error("failover", "pg", "--to", "mars-1", "--dry-run", expected=4, code="not_found")
    assert "members are east-1, north-1, west-1" in unknown
    assert a.crashes() == b.crashes() == c.crashes() == []
