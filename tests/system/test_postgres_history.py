"""A table is dropped under load: a view of the mark before has it, and drills tell them apart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.lab.ports_io import free_port
from tests.system.attach import Attached
from tests.system.database import AS_USER, Cluster, require_postgres
from tests.system.pgbench import (
    AMCHECK,
    BALANCES,
    HISTORY,
    check_image,
    confirmed_commits,
    database_sites,
    end,
    fill,
    start_load,
)
from tests.system.power import run
from tests.system.private_mounts import require_attach
from tests.system.support import (
    Site,
    until,
    wait_applied,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    require_attach()
    with database_sites(tmp_path) as found:
        yield found


def write_check(public: Path) -> Path:
    """A drill's command: PostgreSQL starts on the copy, sums hold, every index is sound."""
    programs, port, sockets = require_postgres(), free_port(), public / "sockets"
    as_user = " ".join(AS_USER)
    where = f"-h {sockets} -p {port}"
    path = public / "try-postgres"
    path.write_text(
        f"""#!/bin/sh
set -e
cd /
data="$GEOMIRROR_MOUNT/data"
rm -f "$data/postmaster.pid"
{as_user} {programs}/pg_ctl -D "$data" -l {sockets}/drill.log -w \\
    -o "-p {port} -k {sockets} -c listen_addresses=" start
{as_user} {programs}/{AMCHECK[0]} {where} {" ".join(AMCHECK[1:])}
test "$({as_user} {programs}/psql -XAt {where} -c "{BALANCES}" postgres)" = t
{as_user} {programs}/pg_ctl -D "$data" -m fast -w stop
"""
    )
    path.chmod(0o755)
    return path


def test_a_dropped_table_is_in_a_view_of_the_mark_before_and_drills_tell(
    sites: tuple[Site, Site], public: Path
) -> None:
    a, b = sites
    attached = Attached(a, public / "disk")
    attached.attach(make_file_system=True)
    cluster = Cluster(require_postgres(), attached.mount / "data", public / "sockets")
    try:
        fill(cluster)
        logs = public / "sockets" / "commits"
        load = start_load(cluster, logs)
        until(lambda: confirmed_commits(logs) > 50, what="some commits")
        known = confirmed_commits(logs)
        made = a.json("mark", "pg", "before-drop", "--fsfreeze", str(attached.mount))
        assert (made["consistency"], made["problems"]) == ("application", [])
        later = int(cluster.ask(HISTORY))
        before = int(cluster.ask(HISTORY))
        until(lambda: int(cluster.ask(HISTORY)) > before, what="the load goes on")
        cluster.ask("drop table pgbench_history")
        end(load)
        wait_applied(a)

        # The copy has the damage, too; the view has what was there.
        view = b.json("view", "create", "pg", "--at", "before-drop")
        assert view["epoch"] == made["epoch"]
        image = public / "view.img"
        run("nbdcopy", view["nbd_uri"], image)
        b.run("view", "delete", "pg", view["name"])
        assert known <= check_image(image, public / "view") <= later
        image.unlink()

        script = str(write_check(public))
        began = time.monotonic()
        good = b.json("drill", "pg", "--at", "before-drop", "--check", script)["drill"]
        assert good["result"] == "passed", good["output"]
        assert good["epoch"] == made["epoch"]
        assert 0 < good["rto_seconds"] < time.monotonic() - began
        bad = b.json("drill", "pg", "--check", script, expected=1)["drill"]
        assert (bad["result"], bad["epoch"] > good["epoch"]) == ("failed", True)
        assert "pgbench_history" in bad["output"]
        assert b.status()["last_drill"]["last_passed_at"] == good["started_at"]

        # None of that touched the volume.
        cluster.stop()
        attached.detach()
        assert a.crashes() == b.crashes() == []
    finally:
        cluster.kill()
        attached.close()
