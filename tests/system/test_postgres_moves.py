"""PostgreSQL is moved to another site and back under load, and taken back before a mistake."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.attach import Attached
from tests.system.database import Cluster, require_postgres
from tests.system.pgbench import (
    HISTORY,
    Ticker,
    check,
    check_image,
    confirmed_commits,
    database_sites,
    end,
    fill,
    restart,
    rows_at_rest,
    start_load,
    ticks,
)
from tests.system.power import run
from tests.system.private_mounts import require_attach
from tests.system.support import Site, until, wait_applied

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    require_attach()
    with database_sites(tmp_path) as found:
        yield found


def same_image(a: Site, b: Site, directory: Path) -> Path:
    """The copy's image, which is the primary's, byte for byte."""
    digests, image = [], directory / "volume.img"
    for site in (a, b):
        run("nbdcopy", site.uri(), image)
        with image.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    assert digests[0] == digests[1]
    return image


def test_a_mistake_is_rewound_to_the_mark_before_and_the_copy_follows(
    sites: tuple[Site, Site], public: Path
) -> None:
    a, b = sites
    attached = Attached(a, public / "disk")
    cluster = Cluster(require_postgres(), attached.mount / "data", public / "sockets")
    try:
        attached.attach(make_file_system=True)
        fill(cluster)
        logs = public / "sockets" / "commits"
        load = start_load(cluster, logs)
        until(lambda: confirmed_commits(logs) > 50, what="some commits")
        known = confirmed_commits(logs)
        a.json("mark", "pg", "before-mistake")
        later = int(cluster.ask(HISTORY))
        cluster.ask("delete from pgbench_accounts where aid % 3 = 0")
        cluster.ask("drop table pgbench_history")
        end(load)
        cluster.stop()
        attached.detach()
        wait_applied(a)

        assert a.json("rewind", "pg", "--to", "before-mistake", "--dry-run")["is_possible"]
        a.run("rewind", "pg", "--to", "before-mistake", "--yes")
        attached.attach()
        restart(cluster)
        assert known <= check(cluster) <= later
        assert int(cluster.ask("select count(*) from pgbench_accounts")) == 100_000
        a.run("rewind", "commit", "pg", "--yes")

        # It goes on from there, and the copy has the same, mistake undone and all.
        more = public / "sockets" / "more"
        load = start_load(cluster, more)
        until(lambda: confirmed_commits(more) > 20, what="commits after the rewind")
        end(load)
        rows = rows_at_rest(cluster)
        cluster.stop()
        attached.detach()
        wait_applied(a)
        image = same_image(a, b, public)
        assert check_image(image, public / "copy") == rows
        assert [peer["resyncs"] for peer in a.status()["peers"]] == [0]
        assert a.crashes() == b.crashes() == []
    finally:
        cluster.kill()
        attached.close()


def move(source: Site, attached: Attached, cluster: Cluster, logs: Path, to: str) -> set[int]:
    """A planned move in the midst of a load; the numbers whose commits were confirmed."""
    load = start_load(cluster, logs)
    ticker = Ticker(cluster)
    until(lambda: len(ticker.confirmed) > 50 and confirmed_commits(logs) > 20, what="commits")
    source.run("switchover", "pg", "--to", to)
    # Here nobody writes any more: what is left of it goes, as with a host.
    attached.pull()
    ticker.end()
    end(load)
    cluster.kill()
    attached.drop()
    return set(ticker.confirmed)


def test_a_database_is_switched_over_under_load_and_back_and_nothing_confirmed_is_lost(
    sites: tuple[Site, Site], public: Path
) -> None:
    a, b = sites
    there, here = Attached(b, public / "west"), Attached(a, public / "east")
    programs = require_postgres()
    east = Cluster(programs, here.mount / "data", public / "east.sockets")
    west = Cluster(programs, there.mount / "data", public / "west.sockets")
    try:
        here.attach(make_file_system=True)
        fill(east)
        confirmed = move(a, here, east, public / "east.sockets" / "load", "west-1")
        assert (a.status()["role"], b.status()["role"]) == ("secondary", "primary")
        there.attach()
        restart(west)
        assert confirmed <= set(ticks(west))
        check(west)

        confirmed |= move(b, there, west, public / "west.sockets" / "load", "east-1")
        assert (a.status()["role"], b.status()["role"]) == ("primary", "secondary")
        here.attach()
        restart(east)
        found = ticks(east)
        assert confirmed <= set(found)
        assert found == list(range(1, len(found) + 1))
        check(east)
        east.stop()
        here.detach()
        wait_applied(a)
        same_image(a, b, public)
        assert [peer["resyncs"] for peer in a.status()["peers"]] == [0]
        assert a.crashes() == b.crashes() == []
    finally:
        for each in (east, west):
            each.kill()
        for each in (here, there):
            each.close()
