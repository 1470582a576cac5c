"""PostgreSQL moves to another site: its primary is lost under load, and comes back with a tail."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.system.attach import Attached
from tests.system.database import Cluster, require_postgres
from tests.system.pgbench import (
    Ticker,
    check,
    check_image,
    database_of,
    database_sites,
    end,
    fill,
    pull_the_plug,
    restart,
    start_load,
    ticks,
)
from tests.system.power import run
from tests.system.support import SEED, Site, until, wait_applied

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]
ALONE_COMMITS = random.Random(SEED).randrange(30, 120)
"""So many are not shipped before the primary is lost: it leaves a tail."""


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    with database_sites(tmp_path, "--journal-size", "1G") as found:
        yield found


def is_gone(site: Site) -> bool:
    found = site.call("failover.assess", name="pg", to="west-1")
    return not found["primary"]["is_reachable"]


def digest(image: Path) -> str:
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lose_the_primary(a: Site, public: Path) -> dict[int, float]:
    """A database under load is lost with its site; the commits that were confirmed, and when."""
    chance = random.Random(SEED)  # How much both sites have, and how long the tail is.
    attached = Attached(a, public / "east")
    cluster = Cluster(require_postgres(), attached.mount / "data", public / "east.sockets")
    try:
        attached.attach(make_file_system=True)
        fill(cluster)
        load = start_load(cluster, public / "east.sockets" / "commits")
        ticker = Ticker(cluster)
        shared = 100 + chance.randrange(100)
        until(lambda: len(ticker.confirmed) > shared, what="commits")
        wait_applied(a)
        a.run("pause", "pg")
        alone = len(ticker.confirmed) + ALONE_COMMITS + chance.randrange(200)
        until(lambda: len(ticker.confirmed) > alone, what="commits that nobody else has")
        pull_the_plug(a, attached, cluster, load)
        ticker.end()
    finally:
        cluster.kill()
        attached.close()
    return ticker.confirmed


def test_a_database_goes_on_at_the_other_site_and_the_first_one_follows_with_its_tail_kept(
    sites: tuple[Site, Site], public: Path
) -> None:
    a, b = sites
    confirmed = lose_the_primary(a, public)
    until(lambda: is_gone(b), what="the primary counts as away")
    said = b.json("failover", "pg", "--to", "west-1", "--dry-run")
    kept_until = datetime.fromisoformat(said["position"]["sealed_at"]).timestamp()
    done = b.json("failover", "pg", "--to", "west-1", "--yes")
    assert done["epoch"] == said["position"]["epoch"]

    attached = Attached(b, public / "west")
    cluster = Cluster(require_postgres(), attached.mount / "data", public / "west.sockets")
    try:
        attached.attach()
        restart(cluster)
        # Every commit confirmed before the point that it said is there, and no other is missing
        # between those that are.
        found = ticks(cluster)
        safe = {number for number, at in confirmed.items() if at < kept_until}
        assert len(safe) > 50
        assert safe <= set(found)
        assert found == list(range(1, len(found) + 1))
        assert len(found) < len(confirmed), "the primary was to leave a tail"
        check(cluster)

        load, ticker = start_load(cluster, public / "west.sockets" / "more"), Ticker(cluster)
        until(lambda: len(ticker.confirmed) > 50, what="commits at the new primary")
        a.restart()
        tail = until(lambda: a.status().get("superseded"), what="the old primary hears of it")
        assert (tail["relation"], tail["branch_epoch"]) == ("diverged", done["epoch"])
        given = b.json("resolve", "pg", "--keep", "west-1", "--yes")
        [branch] = [each["branch"] for each in given["members"] if each.get("branch")]
        assert branch.startswith("orphan-")
        wait_applied(b)
        end(load)
        ticker.end()
        after = ticks(cluster)
        assert set(ticker.confirmed) | set(found) <= set(after)
        cluster.stop()
        attached.detach()
    finally:
        cluster.kill()
        attached.close()
    assert [peer["resyncs"] for peer in b.status()["peers"]] == [0]

    # Both sites have the same, and the tail has every commit that the old primary had confirmed.
    wait_applied(b)
    image, other = public / "east.img", public / "west.img"
    run("nbdcopy", a.uri(), image)
    run("nbdcopy", b.uri(), other)
    assert digest(image) == digest(other)
    other.unlink()
    check_image(image, public / "east-copy")
    view = a.json("branch", "view", "pg", branch)
    image.unlink()
    run("nbdcopy", view["nbd_uri"], image)
    with database_of(image, public / "branch") as cluster:
        assert set(confirmed) <= set(ticks(cluster))
        check(cluster)
    assert a.crashes() == b.crashes() == []
