"""Branch files: their formats for ever, and that nothing but a command takes one away."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from geomirror.errors import NotFoundError, RefusedError, UsageError
from geomirror.limits import SIMULATION
from geomirror.volume.branches import DIRECTORY, BranchRecord, BranchStore, data_name
from geomirror.volume.superblock import (
    GenerationRecord,
    RollbackRecord,
    pack_slot,
    parse_slot,
)
from geomirror.volume.undo_file import UndoWriter
from tests.sim.disk import SimStore
from tests.volume.hexdump import VECTORS, load
from tests.volume.test_superblock import superblock

BLOCK = 4096


def record(name: str = "orphan-0a0b0c0d") -> BranchRecord:
    return BranchRecord(
        name=name,
        base_generation="0a" * 16,
        base_epoch=40,
        base_hash="11" * 32,
        base_wall_ns=1_700_000_000_000_000_000,
        generation="0b" * 16,
        end_epoch=45,
        end_hash="22" * 32,
        end_lsn=123456,
        end_wall_ns=1_700_000_001_000_000_000,
        created_wall_ns=1_700_000_002_000_000_000,
        marks=[("before-upgrade", 43)],
    )


def fill(writer: UndoWriter) -> None:
    writer.add_blocks(0, np.array([3, 4]), b"three".ljust(BLOCK, b".") + bytes(BLOCK))
    writer.add_zero(1, 100, 50)


def saved(store: SimStore, name: str = "orphan-0a0b0c0d") -> BranchStore:
    branches = BranchStore(store, SIMULATION)
    branches.save(record(name), fill)
    branches.confirm(name)
    return branches


def put(store: SimStore, name: str, content: bytes) -> None:
    file = store.create(name, len(content))
    file.pwritev([content], 0)
    file.fdatasync()
    file.close()


def test_golden_vectors_are_read_for_ever() -> None:
    store = SimStore(0)
    put(store, f"{DIRECTORY}/orphan-0a0b0c0d.branch", load((VECTORS / "branch_v1.hex").read_text()))
    put(store, data_name("orphan-0a0b0c0d"), load((VECTORS / "branch_data_v2.hex").read_text()))
    branches = BranchStore(store, SIMULATION)
    found = branches.get("orphan-0a0b0c0d")
    assert replace_sizes(found) == record()
    reader = branches.reader("orphan-0a0b0c0d")
    assert reader.entries() == [(0, 0, 3, 1), (0, 1, 4, 1), (1, 1, 100, 50)]
    assert reader.read_block(0, 3) == b"three".ljust(BLOCK, b".")
    reader.close()


def replace_sizes(found: BranchRecord) -> BranchRecord:
    assert (found.raw_bytes, found.stored_bytes > 0) == (BLOCK, True)
    fields = {name: getattr(found, name) for name in found.__struct_fields__}
    return BranchRecord(**{**fields, "raw_bytes": 0, "stored_bytes": 0})


def test_what_is_written_is_the_golden_vector() -> None:
    store = SimStore(0)
    saved(store)
    written = msgspec.json.decode(store.content(f"{DIRECTORY}/orphan-0a0b0c0d.branch"))
    vector = msgspec.json.decode(load((VECTORS / "branch_v1.hex").read_text()))
    assert written.pop("volumes") == []  # Came later; absent is empty.
    # How well zstd compresses is its own affair.
    assert {**written, "stored_bytes": 0} == {**vector, "stored_bytes": 0}


def test_a_superblock_that_names_a_rollback_is_read_for_ever() -> None:
    expected = superblock(45)
    expected.rollback = RollbackRecord(
        40, "11" * 32, 40, 7, 8, 38, "orphan-0a0b0c0d", [GenerationRecord("0a" * 16, 1)]
    )
    slot = load((VECTORS / "superblock_rollback_v1.hex").read_text())
    found = parse_slot(slot)
    assert found is not None
    assert found.rollback == expected.rollback
    assert parse_slot(pack_slot(expected, 9)) is not None


def test_only_a_command_drops_a_branch() -> None:
    store = SimStore(0)
    saved(store)
    store.crash()
    again = BranchStore(store, SIMULATION)
    assert [each.name for each in again.records()] == ["orphan-0a0b0c0d"]
    again.drop("orphan-0a0b0c0d")
    assert store.list(DIRECTORY) == []
    with pytest.raises(NotFoundError, match="no branch"):
        again.get("orphan-0a0b0c0d")


def test_a_branch_with_a_damaged_record_is_kept_and_named() -> None:
    store = SimStore(0)
    saved(store)
    store.flip_bit(f"{DIRECTORY}/orphan-0a0b0c0d.branch", 3)
    again = BranchStore(store, SIMULATION)
    assert again.damaged == ["orphan-0a0b0c0d"]
    assert len(store.list(DIRECTORY)) == 2
    assert again.free_name("orphan-0a0b0c0d") == "orphan-0a0b0c0d-2"


def test_what_was_never_confirmed_goes_away_unless_its_rollback_is_under_way() -> None:
    store = SimStore(0)
    BranchStore(store, SIMULATION).save(record(), fill)
    assert len(store.list(DIRECTORY)) == 2
    BranchStore(store, SIMULATION, "orphan-0a0b0c0d")
    assert len(store.list(DIRECTORY)) == 2
    BranchStore(store, SIMULATION)
    assert store.list(DIRECTORY) == []


def test_bounds_are_named_before_anything_is_written() -> None:
    store = SimStore(0)
    saved(store)
    for changes in ({"branches_max": 1}, {"branches_bytes_max": 100}):
        with pytest.raises(RefusedError, match="one more does not fit"):
            BranchStore(store, replace(SIMULATION, **changes)).room_bytes()
    with pytest.raises(UsageError, match="not allowed"):
        BranchStore(store, SIMULATION).free_name("../x")
