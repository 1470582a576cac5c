"""PostgreSQL on ext4 on a replicated volume: everything is killed, commits and mirror are judged.

Every transaction of pgbench adds one row to its history and moves an amount between three tables,
so the sums tell whether any was applied in part, and the number of rows whether one was lost.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.attach import Attached
from tests.system.database import Cluster, require_postgres
from tests.system.power import require_power, run
from tests.system.private_mounts import own_mounts
from tests.system.support import Site, create, make_network, some_sites, wait_applied

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]
SCALE = 3
LOAD_S = 4
BALANCES = (
    "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)"
    " and (select sum(tbalance) from pgbench_tellers) = (select sum(delta) from pgbench_history)"
    " and (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history)"
)


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    require_power()
    require_postgres()
    with own_mounts(), some_sites(tmp_path, "a", "b") as (a, b):
        make_network(a, b)
        create(a, "pg", size="512M")
        yield a, b


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that PostgreSQL's user reaches; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="geomirror-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def confirmed_commits(log_prefix: Path) -> int:
    """Transactions whose COMMIT pgbench saw answered: one line each."""
    return sum(
        len(path.read_text().splitlines()) for path in log_prefix.parent.glob(f"{log_prefix.name}*")
    )


def start_load(cluster: Cluster, logs: Path) -> subprocess.Popen[bytes]:
    command = cluster.client_command("pgbench", "-c", "4", "-n", "-T", "60", "-l")
    command += ["--log-prefix", str(logs), "postgres"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")


def test_every_confirmed_commit_is_there_and_the_mirror_is_sound(
    sites: tuple[Site, Site], public: Path
):
    a, b = sites
    attached = Attached(a, public / "disk")
    attached.attach(make_file_system=True)
    cluster = Cluster(require_postgres(), attached.mount / "data", public / "sockets")
    try:
        cluster.create()
        cluster.start()
        cluster.client("pgbench", "-i", "-q", "-s", str(SCALE), "postgres")
        cluster.ask("create extension amcheck")
        logs = public / "sockets" / "commits"
        load = start_load(cluster, logs)
        time.sleep(LOAD_S)
        # Everything at once: the daemon, the disk, the clients, the server.
        a.kill()
        attached.pull()
        load.kill()
        load.wait()
        cluster.kill()
        attached.drop()
        commits = confirmed_commits(logs)
        assert commits > 50

        a.restart()
        attached.attach()
        (cluster.directory / "postmaster.pid").unlink(missing_ok=True)
        cluster.start()
        rows = int(cluster.ask("select count(*) from pgbench_history"))
        assert rows >= commits
        assert cluster.ask(BALANCES) == "t"

        # A mirror taken in the middle of a load is a crash image: PostgreSQL recovers it.
        load = start_load(cluster, public / "sockets" / "more")
        time.sleep(2)
        image = public / "mirror.img"
        run("nbdcopy", b.uri(), image)
        load.kill()
        load.wait()
        cluster.stop()
        attached.detach()
        check_image(image, public / "mirror")

        # And the mirror at the end has everything.
        wait_applied(a)
        run("nbdcopy", b.uri(), image)
        assert check_image(image, public / "last") >= rows
        assert a.crashes() == b.crashes() == []
    finally:
        attached.close()


def check_image(image: Path, directory: Path) -> int:
    """Recover the database of a copy of the volume and look at every index; its history's rows."""
    mount, sockets = directory, directory.with_suffix(".sockets")
    mount.mkdir()
    run("mount", "-o", "loop", image, mount)
    try:
        cluster = Cluster(require_postgres(), mount / "data", sockets)
        # Its pid is one of the other machine; here it could be anybody's.
        (mount / "data" / "postmaster.pid").unlink(missing_ok=True)
        cluster.start()
        try:
            assert cluster.ask(BALANCES) == "t"
            cluster.client("pg_amcheck", "--heapallindexed", "--parent-check", "postgres")
            return int(cluster.ask("select count(*) from pgbench_history"))
        finally:
            cluster.stop()
    finally:
        run("umount", mount)
