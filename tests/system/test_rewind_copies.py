"""Real daemons: a resource with copies is rewound; they go back, keep the tail, and follow."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.support import MIB, create, make_network, some_sites, until, wait_applied
from tests.system.trio import (
    CHUNK,
    Trio,
    agreed,
    branch_letters,
    branches,
    has_all,
    put,
    streams,
    trio,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Trio]:
    with trio(tmp_path) as found:
        yield found


def prepared(sites: Trio) -> None:
    """1 is marked, 2 came later; everybody has both."""
    a = sites[0]
    put(a, 0, "1")
    a.run("mark", "pg", "one")
    put(a, 1, "2")
    agreed(a, sites, "12")


def test_a_rewind_is_taken_back_everywhere(sites: Trio) -> None:
    prepared(sites)
    a, b, c = sites
    done = b.json("rewind", "pg", "--to", "one", "--yes")
    assert done["behind"] == []
    agreed(a, sites, "1-")
    assert branches(a) == branches(b) == branches(c) == [done["branch"]]
    assert [branch_letters(site, done["branch"], 2) for site in sites] == ["12"] * 3
    put(a, 2, "3")
    agreed(a, sites, "1-3")
    back = c.json("rewind", "rollback", "pg")
    assert (back["behind"], back["kept_at"]) == ([], [])
    agreed(a, sites, "12-")
    assert [branches(site) for site in sites] == [[back["branch"]]] * 3
    assert [branch_letters(site, back["branch"], 3) for site in sites] == ["1-3"] * 3
    put(a, 2, "4")
    agreed(a, sites, "124")


def test_a_rewind_is_committed_everywhere(sites: Trio) -> None:
    prepared(sites)
    a = sites[0]
    a.json("rewind", "pg", "--to", "one", "--yes")
    agreed(a, sites, "1-")
    done = a.json("rewind", "commit", "pg", "--yes")
    assert done["kept_at"] == []
    assert [branches(site) for site in sites] == [[], [], []]
    for site in sites:
        site.stop()
        site.restart()
    put(a, 2, "3")
    agreed(a, sites, "1-3")


def test_the_dry_runs_say_what_would_be_done_and_change_nothing(sites: Trio) -> None:
    prepared(sites)
    a, b, c = sites
    for end in ("commit", "rollback"):
        plan = b.json("rewind", end, "pg", "--dry-run", expected=5)
        assert (plan["is_possible"], plan["refusal"]["code"]) == (False, "not_found")
    plan = c.json("rewind", "pg", "--to", "one", "--dry-run")
    assert plan["cut_off"]["bytes"] == CHUNK
    assert plan["rollback"]["is_possible"]
    assert "256 KiB" in c.run("rewind", "pg", "--to", "one", "--dry-run")
    agreed(a, sites, "12")

    done = a.json("rewind", "pg", "--to", "one", "--yes")
    agreed(a, sites, "1-")
    put(a, 2, "3")
    plan = b.json("rewind", "rollback", "pg", "--dry-run")
    assert (plan["returned"], plan["bytes"]) == (done["branch"], CHUNK)
    assert plan["cut_off"]["bytes"] >= CHUNK
    assert plan["cut_off"]["epochs"] > 0
    assert f'end of branch "{done["branch"]}"' in b.run("rewind", "rollback", "pg", "--dry-run")
    plan = b.json("rewind", "commit", "pg", "--dry-run")
    assert (plan["branch"], plan["kept_at"]) == (done["branch"], [])
    agreed(a, sites, "1-3")
    assert branches(a) == branches(b) == branches(c) == [done["branch"]]
    c.stop()
    until(lambda: a.peer(peer="north-1")["state"] == "Disconnected")
    assert a.json("rewind", "commit", "pg", "--dry-run")["kept_at"] == ["north-1"]
    plan = a.json("rewind", "rollback", "pg", "--dry-run", expected=5)
    assert "north-1 is Disconnected" in plan["refusal"]["message"]
    assert "north-1 is Disconnected" in a.error(
        "rewind", "rollback", "pg", expected=5, code="refused"
    )


def test_what_is_more_than_an_epoch_comes_back_as_one_step_everywhere(tmp_path: Path) -> None:
    """More than a quarter of the journal: copies hold the point before until they have it all."""
    chance = random.Random(7)
    size = 96 * MIB
    with some_sites(tmp_path, "a", "b") as (a, b):
        make_network(a, b)
        create(a, "pg", size="96M")
        old, new = chance.randbytes(MIB), chance.randbytes(80 * MIB)
        asyncio.run(a.write(0, old))
        a.run("mark", "pg", "one")
        for offset in range(0, len(new), 4 * MIB):
            asyncio.run(a.write(offset, new[offset : offset + 4 * MIB]))
        wait_applied(a)
        plan = a.json("rewind", "pg", "--to", "one", "--dry-run")
        assert plan["cut_off"]["bytes"] == len(new)
        assert (plan["rollback"]["is_possible"], plan["rollback"]["has_resync"]) == (True, True)
        assert "reaches copies as a resync" in a.run("rewind", "pg", "--to", "one", "--dry-run")
        done = a.json("rewind", "pg", "--to", "one", "--yes")
        assert asyncio.run(b.read(0, MIB)) == old
        held = done["epoch"]
        back = a.json("rewind", "rollback", "pg")
        assert back["returned"] == done["branch"]
        until(lambda: streams(a, "west-1") and has_all(a, "west-1"), 60, what="it follows")
        expected = new + bytes(size - len(new))
        for site in (a, b):
            for offset in range(0, size, 8 * MIB):
                found = asyncio.run(site.read(offset, 8 * MIB))
                assert found == expected[offset : offset + 8 * MIB], (site.name, offset)
            assert site.crashes() == []
            epochs = [p["epoch"] for p in site.json("timeline", "pg")["points"]]
            tip = site.status()["position"]["epoch"]
            assert [e for e in epochs if held < e < tip] == [], site.name
        assert a.peer(peer="west-1")["resyncs"] == 1
        a.kill()
        a.restart()
        until(lambda: streams(a, "west-1"), what="it goes on as before")
        asyncio.run(a.write(0, old))
        wait_applied(a)
        assert asyncio.run(b.read(0, 2 * MIB)) == old + new[MIB : 2 * MIB]


def test_it_is_refused_while_a_copy_is_away(sites: Trio) -> None:
    prepared(sites)
    a, b, _ = sites
    b.stop()
    until(lambda: a.peer(peer="west-1")["state"] == "Disconnected")
    text = a.error("rewind", "pg", "--to", "one", "--yes", expected=5, code="refused")
    assert 'the copy of "pg" at west-1 is Disconnected' in text
    plan = a.json("rewind", "pg", "--to", "one", "--dry-run", expected=5)
    assert not plan["is_possible"]
    b.restart()
    agreed(a, sites, "12")
