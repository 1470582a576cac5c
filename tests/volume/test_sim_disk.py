"""The simulated disk itself: it must lose what a real one may lose, and nothing else."""

from __future__ import annotations

import errno
import random

import pytest

from geomirror.errors import NoSpaceError, StorageError
from tests.sim.disk import CrashStyle, SimStore

LOST, KEPT, MIXED = CrashStyle(0.0), CrashStyle(1.0), CrashStyle(0.5)


def durable(store: SimStore, name: str, size: int, content: bytes = b"") -> None:
    file = store.create(name, size)
    file.pwritev([content], 0)
    file.fdatasync()
    file.close()
    store.sync_directory(name.rpartition("/")[0])


def test_it_behaves_like_a_file() -> None:
    """Random reads, writes, zeroes and truncations against a plain bytearray."""
    source = random.Random(1)
    store = SimStore(1)
    file = store.create("f", 40_000)
    model = bytearray(40_000)
    for _ in range(3000):
        offset, size = source.randrange(50_000), source.randrange(1, 9000)
        action = source.randrange(10)
        if action < 5:
            data = source.randbytes(size)
            cut = source.randrange(size)
            file.pwritev([data[:cut], memoryview(data)[cut:]], offset)
            model.extend(bytes(max(0, offset + size - len(model))))
            model[offset : offset + size] = data
        elif action < 7:
            file.zero(size, offset, punch=bool(action % 2))
            end = min(offset + size, len(model))
            if end > offset:
                model[offset:end] = bytes(end - offset)
        elif action == 7:
            target = source.randrange(30_000, 60_000)
            file.truncate(target)
            del model[target:]
            model.extend(bytes(target - len(model)))
        elif action == 8:
            file.fdatasync()
        else:
            wanted = bytes(model[offset : offset + size]).ljust(size, b"\0")
            assert file.pread(size, offset) == wanted
        assert file.size() == len(model)
    assert store.content("f") == model
    for start, size in file.data_ranges(len(model), 0):
        model[start : start + size] = bytes(size)
    assert not any(model)


def test_a_crash_drops_what_was_not_synced_and_keeps_what_was() -> None:
    store = SimStore(2, writeback=0)
    durable(store, "f", 8192, b"old!" * 2048)
    file = store.open("f")
    file.pwritev([b"new!" * 128], 512)
    store.crash(style=LOST)
    assert store.content("f") == b"old!" * 2048
    file = store.open("f")
    file.pwritev([b"new!" * 128], 512)
    file.fdatasync()
    store.crash(style=LOST)
    assert store.content("f")[512:1024] == b"new!" * 128


def test_sectors_survive_one_by_one_and_whole() -> None:
    seen: set[bytes] = set()
    for seed in range(60):
        store = SimStore(seed)
        durable(store, "f", 4096, b"a" * 4096)
        store.open("f").pwritev([b"b" * 1000], 300)
        store.crash(style=MIXED)
        content = store.content("f")
        for start, stop in ((0, 300), (300, 512), (512, 1024), (1024, 1300), (1300, 4096)):
            assert len(set(content[start:stop])) == 1
        assert content[:300] + content[1300:] == b"a" * 3096
        seen.add(content[300:1300])
    assert len(seen) == 8  # three sectors, each old or new


def test_garbage_never_hits_what_was_durable() -> None:
    garbage = 0
    for seed in range(40):
        store = SimStore(seed)
        durable(store, "f", 16384, b"a" * 1000)
        store.open("f").pwritev([b"b" * 8000], 600)
        store.crash(style=CrashStyle(0.3, 0.5))
        content = store.content("f")
        assert content[:600] == b"a" * 600
        assert set(content[600:1000]) <= {ord("a"), ord("b")}
        garbage += len(set(content[1024:]) - {0, ord("b")}) > 0
    assert garbage > 20


def test_an_older_version_of_a_page_may_have_been_written_back() -> None:
    seen = set()
    for seed in range(200):
        store = SimStore(seed, writeback=0.5)
        durable(store, "f", 512, b"0" * 512)
        file = store.open("f")
        for version in b"123":
            file.pwritev([bytes([version]) * 512], 0)
        store.crash(style=LOST)
        seen.add(store.content("f")[:1])
    assert seen == {b"0", b"1", b"2", b"3"}


def test_a_failed_fdatasync_loses_the_data_and_a_second_one_would_lie() -> None:
    store = SimStore(3, writeback=0)
    durable(store, "f", 512, b"old")
    file = store.open("f")
    file.pwritev([b"new"], 0)
    store.fail("fdatasync")
    with pytest.raises(StorageError):
        file.fdatasync()
    for call in (file.fdatasync, lambda: file.pread(1, 0), lambda: file.pwritev([b"x"], 0)):
        with pytest.raises(StorageError, match="refused after"):
            call()
    again = store.open("f")
    assert again.pread(3, 0) == b"new"
    again.fdatasync()
    store.crash(style=KEPT)
    assert store.content("f")[:3] == b"old"


def test_the_death_of_the_process_loses_nothing_but_its_descriptors() -> None:
    store = SimStore(4)
    file = store.create("d/f", 512)
    file.pwritev([b"x"], 0)
    store.crash(lose_nothing=True)
    assert store.content("d/f")[:1] == b"x"
    with pytest.raises(StorageError, match="Bad file descriptor"):
        file.pread(1, 0)
    store.crash(style=LOST)
    assert store.names() == []


def test_names_are_durable_only_after_their_directory_was_synced() -> None:
    store = SimStore(5)
    durable(store, "d/old", 512, b"1")
    durable(store, "d/gone", 512, b"2")
    store.rename("d/old", "d/new")
    store.unlink("d/gone")
    store.create("d/created", 512)
    assert store.list("d") == ["created", "new"]
    store.crash(style=LOST)
    assert store.list("d") == ["gone", "old"]
    store.rename("d/old", "d/new")
    store.sync_directory()  # another directory
    store.crash(style=LOST)
    assert store.list("d") == ["gone", "old"]
    store.rename("d/old", "d/new")
    store.sync_directory("d")
    store.crash(style=LOST)
    assert store.list("d") == ["gone", "new"]
    assert store.content("d/new")[:1] == b"1"


def test_a_crash_never_shows_one_file_under_two_names_or_loses_a_renamed_one() -> None:
    for seed in range(100):
        store = SimStore(seed)
        durable(store, "a", 512, b"a")
        durable(store, "b", 512, b"b")
        store.rename("a", "c")
        store.rename("b", "a")
        store.rename("c", "d")
        store.crash()
        contents = sorted(store.content(name)[:1] for name in store.names())
        assert contents in ([b"a", b"b"], [b"b"]), store.names()


def test_the_size_of_a_file_is_durable_with_its_data() -> None:
    sizes = set()
    for seed in range(40):
        store = SimStore(seed)
        store.create("f", 4096)
        store.sync_directory()
        store.crash(style=MIXED)
        sizes.add(len(store.content("f")))
    assert sizes == {0, 4096}


def test_a_full_disk_refuses_writes_and_zeroed_files_but_not_sparse_ones() -> None:
    store = SimStore(6, capacity_bytes=10 * 4096)
    store.create("sparse", 1 << 30)
    with pytest.raises(NoSpaceError):
        store.create("zeroed", 11 * 4096, zeroed=True)
    assert not store.exists("zeroed")
    file = store.create("f", 0)
    file.pwritev([bytes(8 * 4096)], 0)
    assert store.free_bytes() == 2 * 4096
    with pytest.raises(NoSpaceError):
        file.pwritev([bytes(3 * 4096)], 8 * 4096)
    file.pwritev([b"x" * 8 * 4096], 0)  # in place
    file.zero(8 * 4096, 0, punch=True)
    assert store.free_bytes() == 10 * 4096


def test_reserved_space_is_there_when_it_is_written() -> None:
    store = SimStore(7, capacity_bytes=10 * 4096)
    file = store.create("f", 8 * 4096, zeroed=True)
    other = store.create("g", 0)
    other.pwritev([bytes(2 * 4096)], 0)
    file.pwritev([b"x" * 8 * 4096], 0)
    with pytest.raises(NoSpaceError):
        other.pwritev([b"x"], 2 * 4096)


def test_faults_hit_the_named_operation_file_and_call() -> None:
    store = SimStore(8)
    file = store.create("journal/1.seg", 512)
    store.fail("pwritev", "journal/*", error=errno.EIO, skip=1, count=2)
    file.pwritev([b"a"], 0)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"pwritev journal/1\.seg: EIO"):
            file.pwritev([b"b"], 0)
    file.pwritev([b"c"], 0)
    assert file.pread(1, 0) == b"c"
    store.fail("create", error=errno.ENOSPC)
    with pytest.raises(NoSpaceError):
        store.create("x", 1)
    assert not store.exists("x")


def test_the_same_seed_gives_the_same_disk() -> None:
    def life(seed: int) -> bytes:
        store = SimStore(seed)
        file = store.create("f", 100_000)
        store.sync_directory()
        for i in range(50):
            file.pwritev([bytes([i]) * 3000], 1700 * i)
            if i % 20 == 0:
                file.fdatasync()
        store.crash()
        return store.content("f")

    assert life(11) == life(11)
    assert len({life(seed) for seed in range(10)}) > 3


def test_the_hook_sees_every_call_and_may_stop_the_machine_there() -> None:
    store = SimStore(9)
    seen: list[tuple[str, str]] = []
    store.on_operation = lambda operation, name: seen.append((operation, name))
    file = store.create("f", 512)
    file.pwritev([b"a"], 0)
    file.fdatasync()
    store.sync_directory()
    assert seen == [("create", "f"), ("pwritev", "f"), ("fdatasync", "f"), ("sync_directory", "")]


def test_a_flipped_bit_is_in_the_cache_and_on_the_disk() -> None:
    store = SimStore(10)
    durable(store, "f", 8192, b"")
    store.flip_bit("f", 8 * 5000 + 2)
    assert store.content("f")[5000] == 4
    store.crash()
    assert store.content("f")[5000] == 4


def test_what_lies_behind_a_lost_size_does_not_come_back() -> None:
    for seed in range(20):
        store = SimStore(seed, writeback=1.0)
        durable(store, "f", 0)
        file = store.open("f")
        file.pwritev([b"x" * 20_000], 0)
        store.crash(style=MIXED)
        file = store.open("f")
        size = file.size()
        assert size in (0, 20_000)
        file.pwritev([b"y"], 40_000)
        assert file.pread(40_000 - size, size) == bytes(40_000 - size)
