"""Names of epochs: what is allowed, what the table tells retention, and the file on the disk."""

from __future__ import annotations

import os

import pytest

from geomirror.errors import IntegrityError, NoSpaceError, NotFoundError, UsageError
from geomirror.volume.marks import Mark, MarkTable, check_mark_name
from geomirror.volume.marks_file import NAME, SaveMarksJob, load_marks, pack_marks, parse_marks
from tests.sim.disk import SimStore
from tests.volume.hexdump import VECTORS, dump, load

GENERATION = bytes(range(16))


def mark(name: str, epoch: int, *, is_quiesced: bool = False) -> Mark:
    return Mark(name, GENERATION, epoch, 1_700_000_000_000_000_000 + epoch, is_quiesced)


def example() -> MarkTable:
    table = MarkTable()
    for number, name in enumerate(["before-upgrade", "nightly.2026-11-23", "v2"], 7):
        table.put(mark(name, number, is_quiesced=number == 8))
        if number != 9:
            table.add_boundary(number)
    return table


def same(left: MarkTable | None, right: MarkTable) -> bool:
    assert left is not None
    return left.marks() == right.marks() and left.boundaries() == right.boundaries()


@pytest.mark.parametrize(
    "name", ["a", "before-upgrade", "v1.2_x", "before-2026-11-23", "x" * 63, "10minutes", "1st"]
)
def test_a_plain_name_is_allowed(name: str) -> None:
    check_mark_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "-10m", "a b", "epoch:7", "12:03:20", "x" * 64, "ä", "a/b", ".hidden", "a\n", "-x"],
)
def test_a_name_that_is_unsafe_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not allowed"):
        check_mark_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "10m",
        "7",
        "1.5h",
        "20ms",
        "3D",
        "2026-11-23",
        "2026-11-23-before",
        "2026-11-23T12",
        "20261123T090000Z",
        "Latest",
    ],
)
def test_a_name_that_reads_as_a_time_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="reads as a point in time"):
        check_mark_name(name)


def test_retention_keeps_the_epochs_that_are_named_and_held() -> None:
    table = example()
    assert table.marked_epochs() == (7, 8)
    table.add_boundary(12)
    assert table.marked_epochs() == (7, 8)  # Nobody has named it.
    table.put(mark("second-name", 8))
    table.remove("nightly.2026-11-23")
    assert table.marked_epochs() == (7, 8)
    table.remove("second-name")
    assert table.marked_epochs() == (7,)
    assert table.boundaries() == (7, 12)
    table.drop_unnamed(11, {7})
    assert table.boundaries() == (7, 12)  # Its name may still be on its way.
    table.drop_unnamed(12, {7})
    assert table.boundaries() == (7,)


def test_a_copy_that_is_made_anew_knows_names_and_holds_none() -> None:
    table = example()
    table.drop_boundaries()
    assert [m.name for m in table.marks()] == ["before-upgrade", "nightly.2026-11-23", "v2"]
    assert not any(table.is_held(m) for m in table.marks())
    assert table.marked_epochs() == ()


def test_a_name_that_moves_to_another_epoch_lets_the_first_one_go() -> None:
    table = example()
    table.put(mark("before-upgrade", 30))
    assert table.get("before-upgrade").epoch == 30
    assert table.boundaries() == (8,)
    with pytest.raises(NotFoundError):
        table.get("nothing")


def test_the_version_tells_changes_only() -> None:
    table = example()
    version = table.version
    table.put(mark("v2", 9))
    table.add_boundary(7)
    table.remove("nothing")
    table.drop_unnamed(100, {7, 8, 9})
    assert table.version == version
    table.put(mark("v2", 9, is_quiesced=True))
    assert table.version == version + 1


def test_golden_vector_of_the_file() -> None:
    golden = load((VECTORS / "marks_v1.hex").read_text())
    assert same(parse_marks(golden), example())
    assert pack_marks(example()) == golden
    assert dump(golden) == (VECTORS / "marks_v1.hex").read_text()


def test_either_copy_is_enough() -> None:
    data = pack_marks(example())
    second = data.rindex(b"GMMARKS\0")
    assert second % 4096 == 0
    length = len(data) - second
    for start in (0, second):
        for at in range(start, start + length):
            damaged = bytearray(data)
            damaged[at] ^= 0x10
            assert same(parse_marks(bytes(damaged)), example()), at
    for end in range(second, len(data)):
        assert same(parse_marks(data[:end]), example()), end


def test_the_file_is_replaced_as_a_whole_or_not_at_all() -> None:
    store = SimStore(1)
    assert len(load_marks(store)) == 0
    SaveMarksJob(store, example()).run()
    table = load_marks(store)
    assert same(table, example())
    table.remove("v2")
    store.capacity_bytes = 0
    with pytest.raises(NoSpaceError):
        SaveMarksJob(store, table).run()
    store.capacity_bytes = 1 << 40
    store.crash()
    assert same(load_marks(store), example())
    SaveMarksJob(store, table).run()
    store.crash()
    assert same(load_marks(store), table)
    assert store.list() == [NAME]


def test_names_are_never_lost_in_silence() -> None:
    store = SimStore(2)
    SaveMarksJob(store, example()).run()
    data = pack_marks(example())
    store.flip_bit(NAME, 8 * 40)
    assert same(load_marks(store), example())
    store.flip_bit(NAME, 8 * (data.rindex(b"GMMARKS\0") + 40))
    with pytest.raises(IntegrityError, match="both copies"):
        load_marks(store)


def test_another_version_is_told_apart_from_damage() -> None:
    body = pack_marks(example())
    other = body.replace(b"GMMARKS\0\x01", b"GMMARKS\0\x02")
    assert parse_marks(other) is None  # The digest covers the version.
    assert parse_marks(b"") is None
    assert parse_marks(os.urandom(8192)) is None
