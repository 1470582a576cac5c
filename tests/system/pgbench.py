"""pgbench on a volume that is mounted, and what has to hold of its database in any copy.

Every transaction of pgbench adds one row to its history and moves an amount between three tables,
so the sums tell whether any was applied in part, and the number of rows whether one was lost.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.system.attach import Attached
from tests.system.database import Cluster, require_postgres
from tests.system.power import require_power, run
from tests.system.private_mounts import own_mounts
from tests.system.support import SEED, Site, create, make_network, some_sites, until

BALANCES = (
    "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)"
    " and (select sum(tbalance) from pgbench_tellers) = (select sum(delta) from pgbench_history)"
    " and (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history)"
)
HISTORY = "select count(*) from pgbench_history"
OTHERS = (
    "select count(*) from pg_stat_activity"
    " where backend_type = 'client backend' and pid != pg_backend_pid()"
)
AMCHECK = ("pg_amcheck", "--heapallindexed", "--parent-check", "postgres")


@contextlib.contextmanager
def database_sites(root: Path, *options: str) -> Iterator[tuple[Site, Site]]:
    """Two linked sites with the resource "pg" of half a GiB, in mounts of their own.

    :param options: of `resource create`, further ones.
    """
    require_power()
    require_postgres()
    with own_mounts(), some_sites(root, "a", "b") as (a, b):
        make_network(a, b)
        create(a, "pg", *options, size="512M")
        yield a, b


@contextlib.contextmanager
def public_directory() -> Iterator[Path]:
    """A directory that PostgreSQL's user reaches; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="geomirror-test-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def start_load(cluster: Cluster, logs: Path) -> subprocess.Popen[bytes]:
    """pgbench with four clients for a minute, unless it is killed."""
    command = cluster.client_command("pgbench", "-c", "4", "-n", "-T", "60", "-l")
    command += [f"--random-seed={1 + SEED}", "--log-prefix", str(logs), "postgres"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")


def end(load: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the clients."""
    load.kill()
    load.wait()


def confirmed_commits(log_prefix: Path) -> int:
    """Transactions whose COMMIT pgbench saw answered: one line each, the last ones not written."""
    return sum(
        len(path.read_text().splitlines()) for path in log_prefix.parent.glob(f"{log_prefix.name}*")
    )


def fill(cluster: Cluster, scale: int = 1) -> None:
    """A new database with pgbench's tables, 100,000 accounts a scale, and what checks indexes."""
    cluster.create()
    cluster.start()
    cluster.client("pgbench", "-i", "-q", "-s", str(scale), "postgres")
    cluster.ask("create extension amcheck")


def restart(cluster: Cluster) -> None:
    """Start on a disk that another machine left in the midst of work."""
    # Its pid is one of the other machine; here it could be anybody's.
    (cluster.directory / "postmaster.pid").unlink(missing_ok=True)
    cluster.start()


def pull_the_plug(site: Site, attached: Attached, cluster: Cluster, *clients: object) -> None:
    """Everything at once: the daemon, the disk, the clients, the server."""
    site.kill()
    attached.pull()
    for client in clients:
        assert isinstance(client, subprocess.Popen)
        end(client)
    cluster.kill()
    attached.drop()


def rows_at_rest(cluster: Cluster) -> int:
    """The rows of its history, when the last transaction of killed clients has ended too."""
    until(lambda: cluster.ask(OTHERS) == "0", what="nobody is connected any more")
    return int(cluster.ask(HISTORY))


def check(cluster: Cluster) -> int:
    """Judge a database: sums and every index; the rows of its history."""
    assert cluster.ask(BALANCES) == "t"
    cluster.client(*AMCHECK)
    return int(cluster.ask(HISTORY))


@contextlib.contextmanager
def database_of(image: Path, directory: Path) -> Iterator[Cluster]:
    """PostgreSQL recovered on a copy of the volume, mounted at `directory`."""
    directory.mkdir()
    run("mount", "-o", "loop", image, directory)
    try:
        sockets = directory.with_suffix(".sockets")
        cluster = Cluster(require_postgres(), directory / "data", sockets)
        restart(cluster)
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        run("umount", directory)


def check_image(image: Path, directory: Path) -> int:
    """Recover the database of a copy of the volume and judge it; its history's rows."""
    with database_of(image, directory) as cluster:
        return check(cluster)


PACE_S = 0.005
"""Between commits of a `Ticker`: it tells the time, the load is pgbench's."""


class Ticker(threading.Thread):
    """Commits numbers, one after another, and knows when each was confirmed."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        cluster.ask("create table if not exists ticks (n integer primary key)")
        found = cluster.ask("select coalesce(max(n), 0) from ticks")
        self.confirmed: dict[int, float] = {}
        """Number → Unix time of the answer to its COMMIT."""
        self._next = int(found) + 1
        command = cluster.client_command("psql", "-XAtq", "postgres")
        # psql keeps its answers back when they go into a pipe.
        at = next(index for index, part in enumerate(command) if part.endswith("/psql"))
        command[at:at] = ["stdbuf", "-oL"]
        self._psql = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd="/",
        )
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        asked, answers = self._psql.stdin, self._psql.stdout
        assert asked is not None
        assert answers is not None
        with contextlib.suppress(OSError, ValueError):
            while not self._stopping.wait(PACE_S):
                number = self._next
                asked.write(f"insert into ticks values ({number}) returning n;\n")
                asked.flush()
                if answers.readline().strip() != str(number):
                    return
                self.confirmed[number] = time.time()
                self._next += 1

    def end(self) -> None:
        """No more commits; safe also when the server is gone."""
        self._stopping.set()
        self._psql.kill()
        self._psql.wait()
        self.join(10)
        assert not self.is_alive()
        for pipe in (self._psql.stdin, self._psql.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def ticks(cluster: Cluster) -> list[int]:
    """The numbers that are committed."""
    return [int(each) for each in cluster.ask("select n from ticks order by n").split()]
