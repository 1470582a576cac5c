"""`geomirror attach`: a real ext4 on a volume whose daemon is killed, and all that can go wrong."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.power import run
from tests.system.private_mounts import MountSite, require_attach
from tests.system.support import SEED, create, make_network, some_sites, until, wait_applied

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[MountSite]:
    """A node with an empty "pg"; at the end nothing of its attachments may be left."""
    require_attach()
    found = MountSite(tmp_path, "a")
    try:
        found.run(
            *("network", "create", "acme", "--site", "east", "--node", "east-1"),
            *("--listen", f"127.0.0.1:{found.port}"),
        )
        found.restart()
        create(found, "pg", secondary=None)
        yield found
        assert found.leftovers() == []
        assert found.crashes() == []
    finally:
        found.end()


def attach(site: MountSite, name: str = "m", *more: str, volume: str = "pg") -> Path:
    """Mount the volume; the mountpoint."""
    path = site.root / name
    path.mkdir(exist_ok=True)
    site.run("attach", volume, str(path), *more)
    return path


def format_volume(site: MountSite, volume: str = "pg") -> None:
    device = site.run("attach", volume, "--device").strip()
    site.inside("mkfs.ext4", "-q", device)
    assert site.json("detach", volume)["is_clean"] is True


def state(site: MountSite) -> str:
    (found,) = site.attached()
    return str(found["state"])


class Writer(threading.Thread):
    """Writes files and makes each durable; `confirmed` holds the digests of those that are."""

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__()
        self._directory = directory
        self._chance = random.Random(seed)
        self.is_stopping = False
        self.confirmed: dict[str, str] = {}
        self.error: OSError | None = None
        self.longest_s = 0.0

    def run(self) -> None:
        number = 0
        try:
            while not self.is_stopping:
                number += 1
                self._write(f"{number % 40}-{self._chance.randrange(1 << 30)}")
                if number > 40 and self.confirmed:
                    old = next(iter(self.confirmed))
                    del self.confirmed[old]
                    (self._directory / old).unlink()
        except OSError as error:
            self.error = error

    def _write(self, name: str) -> None:
        data = self._chance.randbytes(self._chance.randrange(1, 300_000))
        began = time.monotonic()
        with (self._directory / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        self.confirmed[name] = hashlib.sha256(data).hexdigest()

    def stop(self) -> dict[str, str]:
        self.is_stopping = True
        self.join(60)
        assert not self.is_alive()
        assert self.error is None
        return self.confirmed


def digests(directory: Path, names: dict[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


def test_a_mounted_file_system_does_not_notice_that_the_daemon_is_killed(tmp_path: Path) -> None:
    require_attach()
    a = MountSite(tmp_path, "a")
    try:
        with some_sites(tmp_path, "b") as (b,):
            make_network(a, b)
            create(a, "pg", size="256M")
            format_volume(a)
            path = attach(a)
            writer = Writer(a.seen(path), 1 + SEED)
            writer.start()
            for wait_s in (0.0, 0.3, 1.5):
                until(lambda: len(writer.confirmed) > 5, what="load")
                a.kill()
                until(lambda: state(a) == "waiting", what="the loss to be noticed")
                time.sleep(wait_s)
                assert writer.is_alive()
                before = set(writer.confirmed)
                a.restart()
                until(lambda before=before: set(writer.confirmed) - before, what="going on")
            confirmed = writer.stop()
            (found,) = a.attached()
            assert (found["state"], found["errors"]) == ("attached", 0)
            assert found["replayed_requests"] > 0
            assert digests(a.seen(path), confirmed) == confirmed
            assert a.json("detach", "pg")["is_clean"] is True
            assert a.leftovers() == []

            device = a.run("attach", "pg", "--device", "--read-only").strip()
            a.inside("e2fsck", "-f", "-n", device)
            a.run("detach", device)
            path = attach(a, "again", "--read-only")
            assert digests(a.seen(path), confirmed) == confirmed
            with pytest.raises(OSError, match="Read-only"):
                (a.seen(path) / "new").write_bytes(b"")
            a.run("detach", str(path))

            # What the other site has is the same file system.
            wait_applied(a)
            image = tmp_path / "mirror.img"
            run("nbdcopy", b.uri(), image)
            run("e2fsck", "-f", "-n", image)
            assert a.crashes() == b.crashes() == []
        assert a.leftovers() == []
    finally:
        a.end()


def test_a_copy_is_mounted_at_its_epoch_and_never_shows_another_one(tmp_path: Path) -> None:
    require_attach()
    a, b = MountSite(tmp_path, "a"), MountSite(tmp_path, "b")
    try:
        make_network(a, b)
        create(a, "pg")
        format_volume(a)
        there, here = a.seen(attach(a, "there")), tmp_path / "here"
        write_durably(there / "first", b"1")
        # The file system there is in use: what is here is a crash image with a journal to replay.
        wait_applied(a)
        here.mkdir()
        document = b.json("attach", "pg", str(here))
        epoch = document["epoch"]
        assert document["is_read_only"] is True
        assert b.status()["position"]["applied_epoch"] == epoch > 0
        assert b.attached()[0]["scratch_bytes"] > 0
        here = b.seen(here)
        assert (here / "first").read_bytes() == b"1"
        with pytest.raises(OSError, match="Read-only"):
            (here / "new").write_bytes(b"")
        write_durably(there / "second", b"2")
        a.call("resource.wait", name="pg", kind="durable", timeout_s=60)
        assert not (here / "second").exists()
        assert b.status()["position"]["applied_epoch"] == epoch

        # A new daemon goes on with applying, and what is mounted must not change below its users.
        b.kill()
        b.restart()
        until(lambda: state(b) == "stale", what="the other epoch to be noticed")
        assert f"not {epoch}" in b.attached()[0]["reason"]
        b.run("detach", "pg")
        wait_applied(a)
        path = attach(b, "again")
        assert (b.seen(path) / "second").read_bytes() == b"2"
        b.run("detach", "pg")
        # The device alone has no scratch file.
        device = Path(b.run("attach", "pg", "--device").strip())
        with pytest.raises(OSError, match=r"Operation not permitted|Read-only"):
            write_directly(device, b"no")
        b.run("detach", "pg")
        a.run("detach", "pg")
        assert (a.leftovers(), b.leftovers()) == ([], [])
    finally:
        a.end()
        b.end()


def write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def test_who_uses_it_is_named_and_nothing_is_torn_away(site: MountSite) -> None:
    format_volume(site)
    path = attach(site)
    user = site.start_inside("sh", "-c", f"cd {path}; echo here >file; exec sleep 100")
    try:
        until((site.seen(path) / "file").exists)
        said = site.error_inside("detach", "pg", expected=5, code="in_use")
        assert f"sleep ({user.pid})" in said
        assert "--lazy" in said
        assert state(site) == "attached"

        # SIGTERM, as at the end of the machine, waits for the user too; nothing is lost.
        os.kill(site.attached()[0]["pid"], signal.SIGTERM)
        time.sleep(0.3)
        assert state(site) == "attached"
        (site.seen(path) / "more").write_bytes(b"still here")
    finally:
        user.kill()
        user.wait()
    until(lambda: not site.attached(), what="the end")
    path = attach(site)
    assert (site.seen(path) / "more").read_bytes() == b"still here"
    site.run("detach", "pg")


def test_a_lazy_detach_ends_with_the_last_user(site: MountSite) -> None:
    format_volume(site)
    path = attach(site)
    user = site.start_inside("sh", "-c", f"cd {path}; echo here >file; read x <&3; echo more >file")
    user.kill()
    user.wait()
    reader = site.start_inside("sh", "-c", f"cd {path}; echo one >file; sleep 100 & wait")
    try:
        until(lambda: (site.seen(path) / "file").exists())
        # What it has to write before it ends waits for a daemon that does not answer.
        assert site.process is not None
        os.kill(site.process.pid, signal.SIGSTOP)
        try:
            assert site.json("detach", "pg", "--lazy")["is_gone"] is False
            assert state(site) == "detaching"
        finally:
            os.kill(site.process.pid, signal.SIGCONT)
        assert state(site) == "detaching"
        assert not (site.seen(path) / "file").exists()
    finally:
        for pid in (*children(reader.pid), reader.pid):
            os.kill(pid, signal.SIGKILL)
        reader.wait()
    until(lambda: not site.attached(), what="the end")
    path = attach(site)
    assert (site.seen(path) / "file").read_text() == "one\n"
    site.run("detach", "pg")


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_a_device_is_refused_to_be_detached_while_it_is_open_or_mounted(site: MountSite) -> None:
    device = site.run("attach", "pg", "--device").strip()
    site.inside("mkfs.ext4", "-q", device)
    where = site.root / "by-hand"
    where.mkdir()
    site.inside("mount", device, where)
    said = site.error_inside("detach", "pg", expected=5, code="in_use")
    assert f"mounted at {where}" in said
    site.inside("umount", where)
    user = site.start_inside("sh", "-c", f"exec sleep 100 <{device}")
    try:
        until(lambda: Path(f"/proc/{user.pid}/fd/0").readlink() == Path(device))
        assert f"sleep ({user.pid})" in site.error_inside(
            "detach", device, expected=5, code="in_use"
        )
    finally:
        user.kill()
        user.wait()
    assert site.json("detach", device)["is_clean"] is True


@pytest.mark.parametrize("victim", ["pid", "helper_pid"])
def test_what_a_killed_process_leaves_is_told_and_cleaned(site: MountSite, victim: str) -> None:
    format_volume(site)
    path = attach(site)
    write_durably(site.seen(path) / "confirmed", b"kept")
    pid = site.known("pg/0")[victim]
    os.kill(pid, signal.SIGKILL)
    until(lambda: state(site) == "failed", what="the truth")
    (found,) = site.attached()
    assert found["reason"]
    gone = site.json("detach", "pg")
    assert (gone["is_clean"], gone["is_gone"]) == (False, True)
    assert f"unmounted {path}" in gone["cleaned"]
    assert site.attached() == []
    assert site.leftovers() == []

    path = attach(site)
    assert (site.seen(path) / "confirmed").read_bytes() == b"kept"
    # Attaching again cleans up by itself, as a unit that is restarted needs it.
    os.kill(site.known("pg/0")[victim], signal.SIGKILL)
    until(lambda: state(site) == "failed", what="the truth")
    with contextlib.suppress(subprocess.TimeoutExpired):
        site.inside("umount", "--lazy", path, may_fail=True)
    path = attach(site)
    assert (site.seen(path) / "confirmed").read_bytes() == b"kept"
    site.run("detach", "pg")


def test_waiting_is_bounded_and_a_daemon_that_is_away_can_be_given_up(site: MountSite) -> None:
    device = Path(site.run("attach", "pg", "--device", "--timeout", "500ms").strip())
    began = time.monotonic()
    site.kill()
    with pytest.raises(OSError, match="Input/output"):
        write_directly(device, b"lost")
    assert 0.5 <= time.monotonic() - began < 20
    assert site.attached()[0]["errors"] >= 1
    said = site.error_inside("detach", "pg", expected=5, code="refused")
    assert "the daemon is away" in said
    assert "--force" in said
    site.restart()
    until(lambda: state(site) == "attached")
    write_directly(device, b"kept")
    site.kill()
    until(lambda: state(site) == "waiting")
    gone = site.json("detach", "pg", "--force")
    assert (gone["is_clean"], gone["is_gone"]) == (False, True)
    assert site.attached() == []
    site.restart()


def write_directly(device: Path, data: bytes) -> None:
    """Write a block and flush it."""
    descriptor = os.open(device, os.O_RDWR)
    try:
        os.pwrite(descriptor, data * 1024, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def test_what_was_deleted_meanwhile_is_not_waited_for(site: MountSite) -> None:
    device = Path(site.run("attach", "pg", "--device").strip())
    site.run("resource", "delete", "pg", "--yes")
    until(lambda: state(site) == "stale", what="the deletion to be noticed")
    assert "was deleted" in site.attached()[0]["reason"]
    create(site, "pg", secondary=None)
    with pytest.raises(OSError, match="Input/output"):
        write_directly(device, b"not for the new one")
    site.run("detach", "pg")


def test_what_cannot_be_attached_is_refused_with_its_cause(site: MountSite) -> None:
    empty, full = site.root / "empty", site.root / "full"
    empty.mkdir()
    full.mkdir()
    (full / "file").touch()
    wrong = [
        ((), 2, "usage", "name a volume"),
        (("pg",), 2, "usage", "either a mountpoint or --device"),
        (("pg", str(empty), "--device"), 2, "usage", "either a mountpoint or --device"),
        (("../pg", "--device"), 2, "usage", "is not a volume"),
        (("nope", "--device"), 4, "not_found", 'no resource "nope"'),
        (("pg/7", "--device"), 4, "not_found", 'no volume "7"'),
        (("pg", str(full)), 5, "refused", "is not empty"),
        (("pg", str(site.root / "missing")), 5, "refused", "mkdir"),
        (("pg", "/proc"), 5, "refused", "has something mounted on it"),
    ]
    for words, exit_code, code, text in wrong:
        assert text in site.error("attach", *words, expected=exit_code, code=code)
    said = site.error_inside("attach", "pg", str(empty), expected=4, code="not_found")
    assert "nothing that it knows" in said
    assert "is not attached" in site.error("detach", "pg", expected=4, code="not_found")
    assert site.attached() == []
    assert site.leftovers() == []
    device = site.run("attach", "pg", "--device").strip()
    site.inside("mkswap", device)
    site.run("detach", "pg")
    said = site.error_inside("attach", "pg", str(empty), expected=4, code="not_found")
    assert "swap space" in said
    if not Path("/sys/block/nbd0").exists():
        said = site.error_inside(
            "attach", "pg", "--device", "--method", "nbd", expected=5, code="refused"
        )
        assert "modprobe nbd" in said
    said = site.error_inside("attach", "pg", "--device", expected=5, code="refused", as_nobody=True)
    assert "root only" in said
    site.kill()
    site.error("attach", "pg", "--device", expected=3, code="unreachable")
