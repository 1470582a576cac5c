"""PostgreSQL on a replicated volume: everything is killed, commits and mirror are judged."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.attach import Attached
from tests.system.database import Cluster, require_postgres
from tests.system.pgbench import (
    BALANCES,
    HISTORY,
    check_image,
    confirmed_commits,
    database_sites,
    end,
    fill,
    pull_the_plug,
    restart,
    start_load,
)
from tests.system.power import run
from tests.system.support import SEED, Site, until, wait_applied

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]
MORE_S = random.Random(SEED).uniform(0.5, 4)
"""Of load after the first commits, until everything is killed."""


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    with database_sites(tmp_path) as found:
        yield found


def test_every_confirmed_commit_is_there_and_the_mirror_is_sound(
    sites: tuple[Site, Site], public: Path
):
    a, b = sites
    attached = Attached(a, public / "disk")
    attached.attach(make_file_system=True)
    cluster = Cluster(require_postgres(), attached.mount / "data", public / "sockets")
    try:
        fill(cluster, scale=3)
        logs = public / "sockets" / "commits"
        load = start_load(cluster, logs)
        until(lambda: confirmed_commits(logs) > 50, 60, "commits")
        time.sleep(MORE_S)  # The moment is the seed's: nothing tells a good one.
        pull_the_plug(a, attached, cluster, load)
        commits = confirmed_commits(logs)
        assert commits > 50

        a.restart()
        attached.attach()
        restart(cluster)
        rows = int(cluster.ask(HISTORY))
        assert rows >= commits
        assert cluster.ask(BALANCES) == "t"

        # A mirror taken in the middle of a load is a crash image: PostgreSQL recovers it.
        load = start_load(cluster, public / "sockets" / "more")
        time.sleep(2)
        image = public / "mirror.img"
        run("nbdcopy", b.uri(), image)
        end(load)
        cluster.stop()
        attached.detach()
        check_image(image, public / "mirror")

        # And the mirror at the end has everything.
        wait_applied(a)
        run("nbdcopy", b.uri(), image)
        assert check_image(image, public / "last") >= rows
        assert a.crashes() == b.crashes() == []
    finally:
        cluster.kill()
        attached.close()
