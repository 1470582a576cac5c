"""Real daemons: after the loss of a primary, members that hold different epochs become one again.

Whatever is promoted, whoever had more keeps it as a branch and follows; nobody is copied anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.support import MIB, until
from tests.system.trio import (
    CHUNK,
    Trio,
    agreed,
    apart,
    branch_letters,
    branches,
    has_all,
    is_alone,
    letters,
    outranked,
    promote,
    put,
    trio,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Trio]:
    with trio(tmp_path) as found:
        yield found


def test_the_less_advanced_copy_catches_up_from_the_promoted_one(sites: Trio) -> None:
    apart(sites)
    _, b, c = sites
    assert promote(b)["token"] == 2
    put(b, 2, "3")
    agreed(b, (b, c), "123")


def test_a_copy_ahead_of_the_promoted_one_comes_back_with_resolve(sites: Trio) -> None:
    apart(sites)
    a, b, c = sites
    epoch = promote(c)["epoch"]
    put(c, 2, "3")
    outranked(b, "diverged")
    for _ in range(2):
        status = b.status()
        tail = status["superseded"]
        assert (tail["relation"], tail["branch_epoch"]) == ("diverged", epoch)
        assert tail["own"]["epoch"] > epoch
        for side in ("own", "other"):
            assert tail[side]["epochs"] >= 1
            assert tail[side]["bytes"] >= CHUNK
            assert tail[side]["seconds"] is not None
        assert tail["next"] == "geomirror resolve pg --keep north-1"
        assert tail["next"] in status["reason"]
        assert "geomirror resolve pg --keep west-1" in b.run("status", "pg")
        assert letters(b, 3) == "12-", "it stays readable as it is"
        b.stop()
        b.restart()
        outranked(b, "diverged")
    assert branches(b) == []

    dry = b.json("resolve", "pg", "--keep", "north-1", "--dry-run")
    members = {each["node"]: each for each in dry["members"]}
    assert dry["is_resolved"]
    assert members["west-1"]["tail"]["own"]["epoch"] == tail["own"]["epoch"]
    assert members["west-1"]["tail"]["own"]["bytes"] >= CHUNK
    assert members["west-1"]["kept_since"]["bytes"] >= CHUNK
    text = c.run("resolve", "pg", "--keep", "north-1", "--dry-run")
    assert "NORTH-1 SINCE THEN" in text
    assert text.count("epoch, ") + text.count("epochs, ") == 2, "both tails: epochs, time, bytes"
    assert not members["east-1"]["is_reachable"]
    assert branches(b) == []
    done = c.json("resolve", "pg", "--keep", "north-1", "--yes")
    members = {each["node"]: each for each in done["members"]}
    branch = members["west-1"]["branch"]
    assert branch.startswith("orphan-")
    agreed(c, (b, c), "1-3")
    assert branches(b) == [branch]
    assert branch_letters(b, branch, 3) == "12-"

    # The old primary has the same tail.
    a.restart()
    outranked(a, "superseded")
    done = a.json("resolve", "pg", "--keep", "north-1", "--yes")
    assert done["is_resolved"]
    agreed(c, (a, b, c), "1-3")
    assert [branch_letters(a, name, 3) for name in branches(a)] == ["12-"]
    put(c, 3, "4")
    agreed(c, sites, "1-34")


def test_the_operator_prefers_the_tail_of_a_copy(sites: Trio) -> None:
    apart(sites)
    a, b, c = sites
    promote(c)
    put(c, 2, "3")
    outranked(b, "diverged")
    dry = c.json("resolve", "pg", "--keep", "west-1", "--dry-run")
    assert dry["insists"]
    assert "north-1 serves writers now" in c.run("resolve", "pg", "--keep", "west-1", "--dry-run")
    done = c.json("resolve", "pg", "--keep", "west-1", "--yes")
    assert (done["is_resolved"], done["token"]) == (True, 3)
    agreed(b, (b, c), "12-")
    assert [branch_letters(c, name, 3) for name in branches(c)] == ["1-3"]
    assert branches(b) == []
    # What the old primary has is a part of that history: it follows by itself.
    a.restart()
    agreed(b, sites, "12-")
    assert branches(a) == []
    assert b.status()["role"] == "primary"


def test_the_operator_prefers_the_tail_of_the_old_primary(sites: Trio) -> None:
    a, b, c = sites
    put(a, 0, "1")
    a.call("resource.wait", name="pg", kind="applied", timeout_s=60)
    a.call("resource.pause", name="pg", peer=None)
    put(a, 1, "2")
    a.kill()
    until(lambda: is_alone(b) and is_alone(c))
    promote(b)
    put(b, 2, "3")
    agreed(b, (b, c), "1-3")
    a.restart()
    outranked(a, "superseded")
    assert "geomirror resolve pg --keep east-1" in a.run("status", "pg")
    done = c.json("resolve", "pg", "--keep", "east-1", "--yes")
    assert (done["is_resolved"], done["token"]) == (True, 3)
    agreed(a, sites, "12-")
    for site in (b, c):
        assert [branch_letters(site, name, 3) for name in branches(site)] == ["1-3"]
    put(a, 3, "4")
    agreed(a, sites, "12-4")


def test_members_come_back_by_themselves_when_the_settings_say_so(tmp_path: Path) -> None:
    with trio(tmp_path, "--auto-rejoin", "on") as sites:
        apart(sites)
        a, b, c = sites
        promote(c)
        put(c, 2, "3")
        agreed(c, (b, c), "1-3")
        assert [branch_letters(b, name, 3) for name in branches(b)] == ["12-"]
        assert b.events("rejoined")
        a.restart()
        agreed(c, sites, "1-3")
        assert [branch_letters(a, name, 3) for name in branches(a)] == ["12-"]


def test_a_tail_that_does_not_fit_is_asked_for_and_the_setting_is_heeded_later(
    tmp_path: Path,
) -> None:
    with trio(tmp_path) as sites:
        a, b, c = sites
        b.stop()
        config = b.data_dir / "geomirror.toml"
        config.write_text("[storage]\nbranches_bytes_max = 4096\n")
        config.chmod(0o600)
        b.restart()
        until(lambda: a.status()["state"] == "ok")
        apart(sites)
        promote(c)
        put(c, 2, "3")
        outranked(b, "diverged")
        c.run("resource", "set", "pg", "auto_rejoin=on")
        until(lambda: b.events("rejoin_stopped"), what="it says that it cannot")
        status = b.status()
        assert status["state"] == "diverged"
        assert "left for branches" in status["reason"]
        assert "left for branches" in b.run("status", "pg")
        assert (letters(b, 3), branches(b)) == ("12-", [])
        config.unlink()
        b.stop()
        b.restart()
        agreed(c, (b, c), "1-3")
        assert [branch_letters(b, name, 3) for name in branches(b)] == ["12-"]


def test_a_tail_in_which_volumes_grew_is_given_up_too(sites: Trio) -> None:
    a, b, c = sites
    put(a, 0, "1")
    a.call("resource.wait", name="pg", kind="applied", timeout_s=60)
    a.call("resource.pause", name="pg", peer="north-1")
    a.run("volume", "resize", "pg/0", "--size", "96M")
    a.run("volume", "add", "pg", "--size", "16M")
    put(a, 1, "2")
    put(a, 300, "9")
    asyncio.run(a.write(0, b"v" * CHUNK, volume=1))
    until(lambda: has_all(a, "west-1"), what="west-1 has what north-1 has not")
    a.kill()
    until(lambda: is_alone(b) and is_alone(c), what="the primary is gone")
    promote(c)
    assert [v["size_bytes"] for v in c.status()["volumes"]] == [64 * MIB]
    put(c, 2, "3")
    outranked(b, "diverged")
    assert len(b.status()["volumes"]) == 2
    done = c.json("resolve", "pg", "--keep", "north-1", "--yes")
    assert done["is_resolved"], done
    agreed(c, (b, c), "1-3")
    assert [v["size_bytes"] for v in b.status()["volumes"]] == [64 * MIB]
    [branch] = branches(b)
    assert branch_letters(b, branch, 301) == "12" + "-" * 298 + "9"
    image = b.root / "branch.img"
    b.run("branch", "export", "pg", branch, str(image), "--volume", "1")
    assert image.read_bytes() == b"v" * CHUNK + bytes(16 * MIB - CHUNK)

    a.restart()
    outranked(a, "superseded")
    assert a.json("resolve", "pg", "--keep", "north-1", "--yes")["is_resolved"]
    agreed(c, sites, "1-3")
    for site in sites:
        site.stop()
        site.restart()
    until(lambda: c.status()["role"] == "primary")
    agreed(c, sites, "1-3")
    # It grows again, another way: nothing of the tail shows through.
    c.run("volume", "resize", "pg/0", "--size", "80M")
    put(c, 257, "8")
    agreed(c, sites, "1-3" + "-" * 254 + "8" + "-" * 62)
