"""The data directory: sockets with long paths, the lock, atomic files, backings."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import threading

import pytest

from geomirror.errors import IntegrityError, InUseError, NotFoundError, RefusedError, UsageError
from geomirror.limits import GIB, MIB, PRODUCTION
from geomirror.node.backing_check import backing_size, check_backing, holds_data, zero_backing
from geomirror.node.definition_store import DefinitionStore, ResourceEntry
from geomirror.node.lock_io import DaemonLock
from geomirror.node.notify_io import Notifier
from geomirror.node.paths import DataDir, write_file_atomic
from geomirror.node.resource_definition import (
    ResourceDefinition,
    VolumeDefinition,
    default_journal_bytes,
)
from geomirror.volume.store_io import open_backing


def definition(**changes) -> ResourceDefinition:
    values = {
        "name": "pg",
        "resource_id": "0a" * 16,
        "version": 1,
        "primary": "a",
        "secondaries": ["b"],
        "volumes": [VolumeDefinition(0, "0", GIB)],
    }
    return ResourceDefinition(**{**values, **changes})


def test_sockets_lie_in_the_data_directory_when_their_path_is_short(tmp_path):
    found = DataDir(tmp_path)
    assert found.prepare_socket_dir() == tmp_path
    assert found.socket_dir() == tmp_path


def test_a_long_path_moves_the_sockets_and_leaves_a_pointer(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    found = DataDir(deep)
    chosen = found.prepare_socket_dir()
    try:
        assert len(os.fsencode(chosen / "control.sock")) <= 107
        assert stat.S_IMODE(chosen.stat().st_mode) == 0o700
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/elsewhere")
        assert found.socket_dir() == chosen
        chosen.chmod(0o755)
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
        with pytest.raises(UsageError, match="not ours alone"):
            found.prepare_socket_dir()
    finally:
        chosen.rmdir()


def test_a_second_daemon_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    held = DaemonLock(DataDir(tmp_path))
    with pytest.raises(InUseError, match=f"process {os.getpid()}"):
        DaemonLock(DataDir(tmp_path))
    held.release()
    program = (
        "import os, sys; from geomirror.node.lock_io import DaemonLock;"
        "from geomirror.node.paths import DataDir; from pathlib import Path;"
        "lock = DaemonLock(DataDir(Path(sys.argv[1]))); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    DaemonLock(DataDir(tmp_path)).release()


def test_a_look_at_the_lock_does_not_keep_a_daemon_from_starting(tmp_path):
    data_dir = DataDir(tmp_path)
    data_dir.lock.touch()
    with data_dir.lock.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        letting_go = threading.Timer(0.05, fcntl.flock, (looking, fcntl.LOCK_UN))
        letting_go.start()
        lock = DaemonLock(data_dir)
        letting_go.join()
    lock.release()


def test_an_atomic_file_is_private_and_whole(tmp_path):
    write_file_atomic(tmp_path / "f", b"one")
    write_file_atomic(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["f"]


def test_definitions_survive_a_restart(tmp_path):
    path = tmp_path / "resources.json"
    store = DefinitionStore(path)
    entry = ResourceEntry(definition(), "active", confirmed={"b": 1})
    store.put(entry)
    again = DefinitionStore(path)
    assert again.entries() == [entry]
    assert again.get("pg").pending_peers() == []
    again.remove("0a" * 16)
    assert DefinitionStore(path).entries() == []
    with pytest.raises(NotFoundError):
        again.get("pg")


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"format":9,"resources":[]}', b'{"format":1}'])
def test_a_damaged_file_of_definitions_stops_the_node(tmp_path, data):
    (tmp_path / "resources.json").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"resources\.json"):
        DefinitionStore(tmp_path / "resources.json")


def test_a_session_number_is_never_zero():
    assert definition(resource_id="00" * 16).session == 1
    assert definition(resource_id="01000000" + "00" * 12).session == 1
    assert definition(resource_id="00000001" + "00" * 12).session == 1 << 24


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "a/b"},
        {"name": ""},
        {"resource_id": "xyz"},
        {"secondaries": ["a"]},
        {"secondaries": ["b", "b"]},
        {"volumes": []},
        {"volumes": [VolumeDefinition(1, "0", 512)]},
        {"volumes": [VolumeDefinition(0, "0", 513)]},
        {"volumes": [VolumeDefinition(0, "..", 512)]},
        {"volumes": [VolumeDefinition(0, "0", 1 << 60)]},
    ],
)
def test_a_definition_that_cannot_be_is_refused(changes):
    definition().validate()
    with pytest.raises(UsageError):
        definition(**changes).validate()


def test_the_default_journal_follows_the_size_and_the_free_space():
    def size(volume: int, free: int) -> int:
        return default_journal_bytes(volume, free, PRODUCTION)

    assert size(10 * GIB, 1 << 50) == 10 * GIB
    assert size(1 * MIB, 1 << 50) == GIB
    assert size(1 << 45, 1 << 50) == 64 * GIB
    assert size(10 * GIB, 4 * GIB) == 2 * GIB
    assert size(10 * GIB, 0) == PRODUCTION.journal_bytes_min


def test_a_file_holds_data_when_any_part_of_it_is_allocated(tmp_path):
    path = tmp_path / "disk.img"
    assert backing_size(str(path)) is None
    assert not holds_data(str(path))
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    assert not holds_data(str(path))
    with path.open("r+b") as file:
        file.seek(32 * MIB)
        file.write(b"x")
    assert holds_data(str(path))
    zero_backing(str(path))
    assert not holds_data(str(path))
    assert backing_size(str(path)) == 64 * MIB


def test_what_is_refused_as_a_backing(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * MIB)

    def check(path, size=MIB, *, adopted=False, forced=False):
        check_backing(str(path), size, is_adopted=adopted, is_forced=forced)

    check(path, adopted=True)
    check(path, forced=True)
    with pytest.raises(RefusedError, match="holds data"):
        check(path)
    with pytest.raises(RefusedError, match="has 2097152"):
        check(path, 2 * MIB, forced=True)
    with pytest.raises(NotFoundError, match="does not exist"):
        check(tmp_path / "none", adopted=True)
    with pytest.raises(NotFoundError, match="no such directory"):
        check(tmp_path / "none/disk.img")
    with pytest.raises(UsageError, match="neither"):
        check(tmp_path)
    with pytest.raises(UsageError, match="absolute"):
        check("disk.img")


def test_systemd_hears_of_readiness_and_of_life(tmp_path, monkeypatch):
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "n"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        monkeypatch.setenv("WATCHDOG_USEC", "30000000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        notifier = Notifier()
        assert notifier.watchdog_s == 30.0
        assert "NOTIFY_SOCKET" not in os.environ
        notifier.ready("fine")
        notifier.watchdog()
        notifier.stopping()
        said = [listener.recv(4096).decode() for _ in range(3)]
    assert said[0].startswith("READY=1\nSTATUS=fine")
    assert said[1] == "WATCHDOG=1"
    assert said[2].startswith("STOPPING=1")
    notifier.watchdog()  # nobody listens any more: not our problem
    assert Notifier().watchdog_s is None


def test_what_somebody_uses_is_neither_taken_nor_zeroed(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * MIB)
    user = open_backing(path)
    with pytest.raises(InUseError, match=r"disk\.img is held"):
        check_backing(str(path), MIB, is_adopted=False, is_forced=True)
    with pytest.raises(InUseError, match=r"disk\.img is held"):
        zero_backing(str(path))
    user.close()
    assert path.read_bytes() == b"x" * MIB
    zero_backing(str(path))
    assert path.read_bytes() == bytes(MIB)
