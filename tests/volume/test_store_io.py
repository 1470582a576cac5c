"""Files, directories and backing devices over real system calls."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.environment import SystemEntropy
from geomirror.errors import (
    FencedError,
    InUseError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    StorageError,
)
from geomirror.limits import SIMULATION
from geomirror.volume import posix_file_io
from geomirror.volume.journal import Journal
from geomirror.volume.posix_file_io import PosixFile
from geomirror.volume.recovery import recover_journal
from geomirror.volume.store_io import DirectoryStore, open_backing
from tests.volume.journal_kit import RESOURCE, entries, write


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DirectoryStore]:
    made = DirectoryStore(tmp_path / "resources" / "orders", create=True)
    yield made
    made.close()


@pytest.fixture
def file(store: DirectoryStore) -> Iterator[PosixFile]:
    made = store.create("f", 1 << 20)
    yield made
    made.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made_is_private(store: DirectoryStore) -> None:
    old = os.umask(0)
    try:
        store.create("journal/1.seg", 4096).close()
    finally:
        os.umask(old)
    assert mode(store.root / "journal") == mode(store.root) == 0o700
    assert mode(store.root / "journal" / "1.seg") == mode(store.root / "lock") == 0o600


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "a/../../x", "a/b/c", "..", "a\0b"])
def test_a_name_that_leads_outside_is_refused(store: DirectoryStore, name: str) -> None:
    for call in (store.open, store.unlink, store.exists, lambda n: store.create(n, 1)):
        with pytest.raises(StorageError, match="is not a name inside"):
            call(name)
    with pytest.raises(StorageError, match="is not a name inside"):
        store.rename("f", name)


def test_a_symbolic_link_is_not_followed(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"x")
    (store.root / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="open"):
        store.open("link")
    with pytest.raises(StorageError):
        store.create("link", 10)
    assert (tmp_path / "victim").read_bytes() == b"x"


def test_create_list_rename_unlink(store: DirectoryStore) -> None:
    for name in ("journal/b", "journal/a", "top"):
        store.create(name, 10).close()
    (store.root / "journal" / "directory").mkdir()
    assert store.list("journal") == ["a", "b"]
    assert store.list() == ["lock", "top"]
    assert store.list("nothing") == []
    with pytest.raises(StorageError, match="exists"):
        store.create("top", 10)
    store.rename("journal/a", "journal/b")
    store.unlink("top")
    store.unlink("top")
    store.sync_directory()
    store.sync_directory("journal")
    assert (store.list("journal"), store.exists("top")) == (["b"], False)
    with pytest.raises(StorageError, match="No such file"):
        store.open("top")
    with pytest.raises(StorageError, match="No such file"):
        store.rename("top", "x")
    store.sync_directory("nothing")
    assert not (store.root / "nothing").exists()
    assert store.free_bytes() > 1 << 20


def test_a_second_process_cannot_serve_the_same_resource(store: DirectoryStore) -> None:
    with pytest.raises(InUseError, match="held by a running resource or by another process"):
        DirectoryStore(store.root)
    DirectoryStore(store.root, exclusive=False).close()
    store.close()
    DirectoryStore(store.root).close()


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such directory"):
        DirectoryStore(tmp_path / "none")


def test_zeroed_files_have_their_blocks_and_sparse_ones_do_not(store: DirectoryStore) -> None:
    size = (3 << 20) + 512
    zeroed, sparse = store.create("z", size, zeroed=True), store.create("s", size)
    assert (zeroed.size(), sparse.size()) == (size, size)
    zeroed.fdatasync()
    assert (store.root / "z").stat().st_blocks * 512 >= size
    assert (store.root / "s").stat().st_blocks == 0
    zeroed.close()
    sparse.close()


def test_a_file_that_could_not_be_zeroed_is_not_left_behind(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(NoSpaceError, match=r"write .*orders/z: No space left"):
        store.create("z", 4096, zeroed=True)
    assert not store.exists("z")


def test_reads_are_exact_and_zero_beyond_the_end(file: PosixFile) -> None:
    file.pwritev([b"abc", memoryview(b"def"), b"", bytearray(b"g")], 100)
    assert file.pread(9, 99) == b"\0abcdefg\0"
    file.pwritev([b"end"], (1 << 20) - 3)
    assert file.pread(10, (1 << 20) - 3) == b"end" + bytes(7)
    assert file.pread(10, 1 << 30) == bytes(10)


def test_more_buffers_than_one_call_takes(file: PosixFile) -> None:
    buffers = [bytes([i % 251]) * (i % 7) for i in range(5000)]
    file.pwritev(buffers, 10)
    whole = b"".join(buffers)
    assert file.pread(len(whole), 10) == whole


@pytest.mark.parametrize("portion", [1, 3, 1000])
def test_short_writes_and_reads_are_continued(
    file: PosixFile, monkeypatch: pytest.MonkeyPatch, portion: int
) -> None:
    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr(
        os, "pwritev", lambda d, b, offset: pwrite(d, b"".join(b)[:portion], offset)
    )
    monkeypatch.setattr(os, "pwrite", lambda d, b, offset: pwrite(d, b[:portion], offset))
    monkeypatch.setattr(os, "pread", lambda d, size, offset: pread(d, min(size, portion), offset))
    file.pwritev([b"hello ", b"world" * 20], 5)
    assert file.pread(106, 5) == b"hello " + b"world" * 20


def test_a_device_that_takes_no_more_is_an_error(
    file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *arguments: 0)
    monkeypatch.setattr(os, "pwrite", lambda *arguments: 0)
    with pytest.raises(StorageError, match="takes no more"):
        file.pwritev([b"x"], 0)


def test_a_full_disk_has_its_own_error(file: PosixFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(NoSpaceError, match="quota"):
        file.pwritev([b"x"], 0)
    monkeypatch.undo()
    file.pwritev([b"x"], 0)


def test_a_failed_fdatasync_is_never_tried_again(
    file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fail(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        raise OSError(errno.EIO, "Input/output error")

    file.pwritev([b"x"], 0)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(StorageError, match=r"fdatasync .*orders/f: Input/output error"):
        file.fdatasync()
    monkeypatch.undo()
    for call in (
        file.fdatasync,
        lambda: file.pread(1, 0),
        lambda: file.pwritev([b"x"], 0),
        lambda: file.zero(1, 0, punch=False),
        file.size,
    ):
        with pytest.raises(StorageError, match="not used after a failed fdatasync"):
            call()
    assert calls == 1


def test_a_sync_beside_a_failing_one_does_not_claim_success(
    file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    results: list[str] = []

    def fail_once(descriptor: int) -> None:
        if not entered.is_set():
            entered.set()
            go_on.wait(10)
            raise OSError(errno.EIO, "Input/output error")

    def sync() -> None:
        try:
            file.fdatasync()
            results.append("durable")
        except StorageError:
            results.append("failed")

    monkeypatch.setattr(os, "fdatasync", fail_once)
    threads = [threading.Thread(target=sync) for _ in range(2)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert results == ["failed", "failed"]


@pytest.mark.parametrize("is_supported", [True, False])
@pytest.mark.parametrize("punch", [True, False])
def test_zero_reads_as_zeros_and_touches_nothing_else(
    file: PosixFile, monkeypatch: pytest.MonkeyPatch, punch: bool, is_supported: bool
) -> None:
    if not is_supported:
        monkeypatch.setattr(posix_file_io, "_fallocate", None)
    size = 1 << 20
    for offset, length in ((0, 4096), (1, 1), (4095, 8194), (100_000, 300_001), (0, size)):
        file.pwritev([b"x" * size], 0)
        file.zero(length, offset, punch=punch)
        expected = b"x" * offset + bytes(length) + b"x" * (size - offset - length)
        assert file.pread(size, 0) == expected
    file.pwritev([b"x"], size - 1)
    file.zero(4096, size - 1, punch=punch)
    file.zero(4096, size + 5, punch=punch)
    assert (file.size(), file.pread(1, size - 1)) == (size, b"\0")


def test_punching_frees_space(store: DirectoryStore) -> None:
    file = store.create("p", 1 << 20, zeroed=True)
    file.fdatasync()
    path = store.root / "p"
    before = path.stat().st_blocks
    file.zero(1 << 20, 0, punch=True)
    file.fdatasync()
    after = path.stat().st_blocks
    file.close()
    assert after < before


def test_data_ranges_show_holes(file: PosixFile) -> None:
    assert file.data_ranges(1 << 20, 0) == []
    file.pwritev([b"x" * 4096], 65536)
    file.pwritev([b"x" * 4096], 300 * 1024)
    ranges = file.data_ranges(1 << 20, 0)
    assert sum(size for _, size in ranges) < 300_000
    for offset in (65536, 300 * 1024):
        assert any(start <= offset < start + size for start, size in ranges)
    ((start, size),) = file.data_ranges(100, 65536 + 10)
    assert (start, size) == (65536 + 10, 100)
    assert file.data_ranges(1 << 20, 1 << 20) == []


def test_data_ranges_look_for_no_more_than_they_are_asked(file: PosixFile) -> None:
    for at in range(3):
        file.pwritev([b"x" * 4096], at * 128 * 1024)
    first, second, rest = file.data_ranges(1 << 20, 0, 2)
    assert (first[0], second[0]) == (0, 128 * 1024)
    assert rest == (sum(second), (1 << 20) - sum(second))
    assert len(file.data_ranges(1 << 20, 0, 3)) <= 4


def test_many_reads_and_writes_in_one_call(file: PosixFile) -> None:
    size = file.size()
    file.pwritev_each([(0, [b"a" * 10, b"b" * 10]), (4096, [b"c" * 10]), (size - 4, [b"d" * 4])])
    ranges = [(5, 10), (4090, 10), (size - 4, 8)]
    assert file.pread_each(ranges) == [b"aaaaabbbbb", bytes(6) + b"cccc", b"dddd" + bytes(4)]
    buffer = memoryview(bytearray(b"?" * 12))
    file.pread_into(buffer[2:], size - 4)
    assert bytes(buffer) == b"??dddd" + bytes(6)
    file.pread_into(buffer, 8192)
    assert bytes(buffer) == bytes(12)


def test_a_short_write_among_many_is_completed(
    file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, data, offset: real(fd, data[0][:5], offset))
    file.pwritev_each([(0, [b"0123456789"]), (100, [b"abcdefghij"])])
    assert file.pread_each([(0, 10), (100, 10)]) == [b"0123456789", b"abcdefghij"]


def test_failures_among_many_name_the_file(
    file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("pwrite", "pread", "preadv"):
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(NoSpaceError, match="write"):
        file.pwritev_each([(0, [b"x"])])
    with pytest.raises(StorageError, match="read"):
        file.pread_each([(0, 1)])
    with pytest.raises(StorageError, match="read"):
        file.pread_into(memoryview(bytearray(1)), 0)


def test_data_ranges_without_support_are_everything(
    file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, position: int, how: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "lseek", refuse)
    assert file.data_ranges(1 << 20, 4096) == [(4096, (1 << 20) - 4096)]


def test_a_size_that_no_file_can_have_is_a_lack_of_space(file: PosixFile) -> None:
    before = file.size()
    with pytest.raises(NoSpaceError, match="takes no such file"):
        file.truncate(1 << 62)
    assert file.size() == before


def test_truncate_and_close(file: PosixFile) -> None:
    file.truncate(2 << 20)
    assert file.size() == 2 << 20
    file.close()
    file.close()
    with pytest.raises(StorageError, match="is closed"):
        file.pread(1, 0)


def test_a_backing_file_is_made_sparse_and_locked(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with pytest.raises(NotFoundError, match="does not exist"):
        open_backing(path)
    file = open_backing(path, create_size=1 << 40)
    assert (file.size(), mode(path), path.stat().st_blocks) == (1 << 40, 0o600, 0)
    with pytest.raises(InUseError, match="held by a running resource or by another process"):
        open_backing(path)
    open_backing(path, exclusive=False).close()
    file.close()
    open_backing(path).close()


def test_an_existing_backing_must_be_large_enough_and_keeps_its_content(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"precious" * 512)
    with pytest.raises(RefusedError, match="has 4096 bytes, 8192 are needed"):
        open_backing(path, create_size=8192)
    file = open_backing(str(path), create_size=4096)
    assert file.pread(8, 0) == b"precious"
    file.close()


def test_only_files_and_block_devices_can_back_a_volume(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(RefusedError, match="neither a regular file nor a block device"):
            open_backing(path)
    (tmp_path / "f").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        open_backing(tmp_path / "f" / "g")


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "loop.img"
    image.write_bytes(b"x" * (1 << 20))
    try:
        made = subprocess.run(
            ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop device: {error}")
    name = made.stdout.strip()
    yield name
    subprocess.run(["losetup", "--detach", name], check=True)


@pytest.mark.system
def test_a_block_device(loop_device: str) -> None:
    file = open_backing(loop_device, create_size=1 << 20)
    try:
        assert file.size() == 1 << 20
        with pytest.raises(InUseError):
            open_backing(loop_device)
        for punch in (True, False):
            file.pwritev([b"y" * 65536], 0)
            file.zero(10_000, 100, punch=punch)
            file.zero(8192, 16384, punch=punch)
            expected = b"y" * 100 + bytes(10_000) + b"y" * (16384 - 10_100) + bytes(8192)
            assert file.pread(16384 + 8192 + 1, 0) == expected + b"y"
        file.fdatasync()
        assert sum(size for _, size in file.data_ranges(1 << 20, 0)) > 0
        file.truncate(1 << 20)
        with pytest.raises(StorageError, match=r"block device .* cannot be cut to 4096 bytes"):
            file.truncate(4096)
    finally:
        file.close()


def test_a_journal_lives_through_a_restart_on_real_files(store: DirectoryStore) -> None:
    arguments = {"resource_id": RESOURCE, "journal_bytes": 8 * SIMULATION.segment_bytes}
    journal = Journal.create(store, SIMULATION, SystemEntropy(), **arguments)  # type: ignore[arg-type]
    scan_lsn = journal.end_lsn
    payloads = [os.urandom(size) for size in (1, 512, 4096, 30_000) * 20]
    lsns: list[int] = []
    for start in range(0, len(payloads), 10):
        lsns += journal.append([write(one) for one in payloads[start : start + 10]], 1)
        job = journal.begin_sync()
        job.run()
        journal.complete_sync(job)
        spare = journal.spare_job()
        if spare is not None:
            spare.run()
            journal.complete_spare(spare)
    known = journal.durable_lsn
    journal.close()
    for _ in range(3):
        recovered = recover_journal(
            store,
            SIMULATION,
            SystemEntropy(),
            scan_lsn=scan_lsn,
            known_durable_lsn=known,
            **arguments,  # type: ignore[arg-type]
        )
        assert [one.payload for one in entries(recovered)] == payloads
        recovered.journal.close()
    name = f"{lsns[7] // SIMULATION.segment_bytes:016x}.seg"
    path = store.root / "journal" / name
    data = bytearray(path.read_bytes())
    data[lsns[7] % SIMULATION.segment_bytes + 80] ^= 1
    path.write_bytes(data)
    with pytest.raises(FencedError, match=name):
        recover_journal(
            store,
            SIMULATION,
            SystemEntropy(),
            scan_lsn=scan_lsn,
            known_durable_lsn=known,
            **arguments,  # type: ignore[arg-type]
        )
