"""A primary is lost in the middle of a resync; the copy is promoted at the epoch that it held.

```
 copy has E0 ─ link down, journal overflows ─ link back, slow: resync ─ SIGKILL of the primary
   ─▶ failover: reads and a write at once ─▶ fsck, every index, every balance
```
`GEOMIRROR_RESYNC_CUTS=50` makes it as many rounds as that.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from geomirror.lab.lab_io import Lab
from geomirror.limits import BLOCK_BYTES
from geomirror.nbd.client_io import NbdClient
from tests.system.attach import Attached
from tests.system.database import Cluster, require_postgres
from tests.system.far_sites import Loop
from tests.system.power import require_power, run
from tests.system.private_mounts import own_mounts, require_attach
from tests.system.support import MIB, SEED, Site, create, until, wait_applied

ROUNDS = int(os.environ.get("GEOMIRROR_RESYNC_CUTS", "2"))
pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]
VOLUME = "512M"
OVERFLOW_BYTES = 144 * MIB
"""More than a journal of 256 MiB keeps for a peer that is away."""
RESYNC_LINK = "rtt=20ms,rate=40mbit"
"""5 MB/s: half a minute for what was written meanwhile, so that a cut falls into it."""
OPEN_LINK = "rtt=20ms,rate=unlimited"
CUT_S_MAX = 12.0
FIRST_WRITE_S_MAX = 10.0
"""A target of one second is for the benchmarks; here others run, too."""
SCALE = 3
HISTORY = "(select coalesce(sum(delta), 0) from pgbench_history)"
BALANCES = (
    f"select (select sum(abalance) from pgbench_accounts) = {HISTORY}"
    f" and (select sum(tbalance) from pgbench_tellers) = {HISTORY}"
    f" and (select sum(bbalance) from pgbench_branches) = {HISTORY}"
)


@dataclass
class Place:
    """One node: its daemon is the lab's, its commands are this test's."""

    site: Site
    node: Any
    attached: Attached
    sockets: Path

    @property
    def mount(self) -> Path:
        return self.attached.mount


class Places:
    """Two nodes and the link between them."""

    def __init__(self, root: Path, public: Path) -> None:
        self._loop = Loop("lab")
        names = ("east", "west")
        self.lab = Lab(
            root / "lab",
            nodes=[(name, f"{name}-1") for name in names],
            links={("east-1", "west-1"): OPEN_LINK},
        )
        self.places: list[Place] = []
        try:
            self._loop.run(self.lab.start())
            for name, node in zip(names, self.lab.nodes, strict=True):
                site = Site(root, name, node.data_dir)
                site.log_path = node.log
                attached = Attached(site, public / name)
                self.places.append(Place(site, node, attached, public / f"{name}.run"))
        except BaseException:
            self.close()
            raise

    @property
    def primary(self) -> Place:
        return self.places[0]

    @property
    def copy(self) -> Place:
        return self.places[1]

    def link(self, settings: str) -> None:
        """Let it pass, like this."""
        link = self.lab.link("east-1", "west-1")
        self._loop.run(link.set(settings))
        self._loop.run(link.up())

    def cut_link(self) -> None:
        """Nothing passes."""
        self._loop.run(self.lab.link("east-1", "west-1").down())

    def kill(self, place: Place) -> None:
        """SIGKILL of its daemon."""
        self._loop.run(place.node.kill())

    def unplug(self) -> None:
        """End databases, and take every attachment away."""
        for place in self.places:
            pid_file = place.mount / "data" / "postmaster.pid"
            if pid_file.exists():
                Cluster(require_postgres(), place.mount / "data", place.sockets).kill()
            place.attached.close()

    def close(self) -> None:
        """Leave nothing behind."""
        try:
            self._loop.run(self.lab.stop())
        finally:
            self._loop.close()


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    require_power()
    require_attach()
    require_postgres()
    public = Path(tempfile.mkdtemp(prefix="geomirror-test-"))
    public.chmod(0o755)
    # Threads that are begun inside would keep this one from leaving.
    found = Places(tmp_path, public)
    try:
        create(found.primary.site, "pg", size=VOLUME)
        with own_mounts():
            try:
                yield found
            finally:
                found.unplug()
    finally:
        found.close()
        shutil.rmtree(public)


class Load:
    """Transactions, and a file that has to be whole in every state from its sync on."""

    def __init__(self, place: Place, number: int) -> None:
        self.cluster = Cluster(require_postgres(), place.mount / "data", place.sockets)
        self._place = place
        self._number = number
        self._pgbench: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start the database, and transactions that go on until `kill`."""
        self.cluster.start()
        # Not all that the disk takes: a resync over a slow link has to come to an end, too.
        load = ("-c", "2", "-R", "150", "-n", "-T", "600")
        command = self.cluster.client_command("pgbench", *load, "postgres")
        self._pgbench = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
        )

    def keep_file(self) -> bytes:
        """Write a file and sync it; its digest."""
        content = random.Random(self._number).randbytes(MIB)
        path = self._place.mount / f"kept-{self._number}"
        path.write_bytes(content)
        run("sync", "-f", path)
        return hashlib.sha256(content).digest()

    def flood(self) -> None:
        """More than the journal keeps, within seconds; transactions go on."""
        path = self._place.mount / "flood"
        chance = random.Random(1000 + self._number)
        with path.open("wb") as file:
            for _ in range(OVERFLOW_BYTES // MIB):
                file.write(chance.randbytes(MIB))
            file.flush()
            os.fsync(file.fileno())

    def kill(self) -> None:
        """Clients and server."""
        if self._pgbench is not None:
            self._pgbench.kill()
            self._pgbench.wait()
            self._pgbench = None
            self.cluster.kill()


def is_whole(primary: Place) -> bool:
    peer = primary.site.peer()
    return (peer["state"], peer["disk_state"]) == ("Stream", "UpToDate")


def overflow_and_resync(places: Places, load: Load) -> None:
    """Returns in the middle of a resync, the link slow."""
    primary, copy = places.primary.site, places.copy.site
    before = len(primary.events("journal_overflow"))
    places.cut_link()
    load.flood()
    until(lambda: len(primary.events("journal_overflow")) > before, 60, "the journal overflows")
    places.link(RESYNC_LINK)
    until(lambda: primary.peer()["state"] == "Resync", 90, "the resync begins")
    until(lambda: copy.peer()["resync"], 30, "the copy is held")


def promote(places: Places) -> float:
    """Make the copy the primary; seconds from the command to the first write accepted."""
    copy = places.copy.site
    name = places.copy.node.name
    until(
        lambda: not copy.call("failover.assess", name="pg", to=name)["primary"]["is_reachable"],
        what="the copy knows that the primary is gone",
    )

    async def first_write() -> None:
        # The last block as it is: whatever lies there, a file system is not harmed.
        async with await NbdClient.connect(copy.uri()) as client:
            offset = client.size_bytes - BLOCK_BYTES
            await client.write(offset, bytes(await client.read(offset, BLOCK_BYTES)))

    began = time.monotonic()
    copy.call("promotion.failover", name="pg", to=name)
    asyncio.run(first_write())
    return time.monotonic() - began


def check_file_system(site: Site, image: Path) -> None:
    """Copy the volume; its file system's journal replayed, nothing is wrong with it."""
    run("nbdcopy", site.uri(), image)
    mount = image.with_suffix(".mount")
    mount.mkdir(exist_ok=True)
    run("mount", "-o", "loop", image, mount)
    run("umount", mount)
    run("e2fsck", "-fn", image)
    image.unlink()


def check_database(place: Place) -> Cluster:
    """Mount, recover and look at everything; the cluster runs afterwards."""
    place.attached.attach()
    cluster = Cluster(require_postgres(), place.mount / "data", place.sockets)
    (cluster.directory / "postmaster.pid").unlink(missing_ok=True)
    cluster.start()
    assert cluster.ask(BALANCES) == "t"
    cluster.client("pg_amcheck", "--heapallindexed", "--parent-check", "postgres")
    cluster.stop()
    return cluster


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_copy_that_is_cut_off_in_a_resync_is_promoted_whole(
    places: Places, tmp_path: Path, number: int
) -> None:
    chance = random.Random(SEED + number)
    primary, copy = places.primary, places.copy
    primary.attached.attach(make_file_system=True)
    cluster = Cluster(require_postgres(), primary.mount / "data", primary.sockets)
    cluster.create()
    cluster.start()
    cluster.client("pgbench", "-i", "-q", "-s", str(SCALE), "postgres")
    cluster.ask("create extension amcheck")
    cluster.stop()
    load = Load(primary, number)
    digest = load.keep_file()
    wait_applied(primary.site)
    until(lambda: is_whole(primary), 60, "the copy is whole")
    load.begin()
    time.sleep(chance.uniform(1, 4))  # By the seed: how much history the copy has, …
    try:
        overflow_and_resync(places, load)
        held = copy.site.peer()["resync"]["held_epoch"]
        time.sleep(chance.uniform(0.2, CUT_S_MAX))  # … and where in the resync it is cut off.
        assert copy.site.peer()["resync"], "the resync is over: make the link slower"
        places.kill(primary)
    finally:
        primary.attached.pull()
        load.kill()
        primary.attached.drop()
    first_write_s = promote(places)
    print(f"first write after {first_write_s:.2f} s, held epoch {held}")
    assert first_write_s < FIRST_WRITE_S_MAX
    # While the image goes back behind it, and once it has.
    check_file_system(copy.site, tmp_path / "image")
    check_database(copy)
    until(lambda: copy.site.status()["behind"] is None, 60, "the volume is back")
    check_file_system(copy.site, tmp_path / "image")
    kept = (copy.mount / f"kept-{number}").read_bytes()
    assert hashlib.sha256(kept).digest() == digest
    assert not (copy.mount / "flood").exists()
    assert primary.site.crashes() == copy.site.crashes() == []
