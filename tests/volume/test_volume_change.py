"""A volume change: its bytes, its merging, what may follow what, and sizes at earlier epochs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from geomirror.errors import IntegrityError
from geomirror.limits import SIMULATION
from geomirror.volume.epoch_record import decode_epoch, encode_epoch
from geomirror.volume.epoch_table import HASH_ZERO, KIND_ZERO, Epoch, chain_hash, empty_table
from geomirror.volume.volume_change import (
    VolumeChange,
    canonical_changes,
    change_problem,
    decode_changes,
    encode_changes,
    merge_changes,
)
from geomirror.volume.volume_sizes import VolumeSizes
from tests.volume.hexdump import dump, load

VECTORS = Path(__file__).parent.parent / "vectors"
GROWN = VolumeChange(0, "0", 8192, 12288)
ADDED = VolumeChange(1, "wal", 0, 4608, {"east-1": "/dev/vg0/wal"}, is_forced=True)


def epoch() -> Epoch:
    table = empty_table(2)
    table["volume"], table["kind"], table["flags"] = (0, 1), KIND_ZERO, 1
    table["block"], table["count"] = (2, 0), (1, 2)
    changes = (GROWN, ADDED)
    chain = chain_hash(HASH_ZERO, bytes(16), 7, 100, 200, table, changes)
    return Epoch(7, 7, bytes(16), 100, 200, 5, chain, table, changes=changes)


def test_golden_vector_and_round_trip() -> None:
    payload = encode_epoch(epoch(), 64)
    vector = (VECTORS / "epoch_record_growth_v1.hex").read_text()
    assert dump(payload) == vector
    decoded, _ = decode_epoch(load(vector))
    assert decoded.changes == (GROWN, ADDED)
    assert decoded.chain_hash == epoch().chain_hash
    assert np.array_equal(decoded.table, epoch().table)


def test_every_truncation_of_the_changes_is_refused() -> None:
    payload = encode_epoch(epoch(), 0)
    for size in range(len(payload)):
        with pytest.raises(IntegrityError):
            decode_epoch(payload[:size])


def test_the_hash_covers_sizes_and_names_but_no_paths() -> None:
    def hash_of(*changes: VolumeChange) -> bytes:
        return chain_hash(HASH_ZERO, bytes(16), 1, 0, 1, empty_table(), changes)

    other_path = VolumeChange(1, "wal", 0, 4608, {"east-1": "/elsewhere"})
    assert hash_of(ADDED) == hash_of(other_path)
    different = [
        hash_of(),
        hash_of(ADDED),
        hash_of(GROWN),
        hash_of(GROWN, ADDED),
        hash_of(VolumeChange(0, "0", 8192, 12800)),
        hash_of(VolumeChange(0, "0", 4096, 12288)),
        hash_of(VolumeChange(0, "1", 8192, 12288)),
    ]
    assert len(set(different)) == len(different)
    assert canonical_changes(()) == b""


@pytest.mark.parametrize(
    "data",
    [b"{", b"[1]", b"\xff", b"[" * 100_000, encode_changes([VolumeChange(0, "0", 8192, 8192)])],
)
def test_other_bytes_are_no_changes(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        decode_changes(data, "record")


def test_changes_of_one_volume_become_one() -> None:
    again = VolumeChange(1, "wal", 4608, 9216)
    assert merge_changes([ADDED, GROWN, again]) == (
        GROWN,
        VolumeChange(1, "wal", 0, 9216, ADDED.backings, is_forced=True),
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (VolumeChange(0, "0", 8192, 8704), ""),
        (VolumeChange(1, "wal", 0, 512), ""),
        (VolumeChange(0, "0", 8192, 8192), "would not grow"),
        (VolumeChange(0, "0", 8192, 4096), "would not grow"),
        (VolumeChange(0, "0", 4096, 12288), "was 4096 bytes"),
        (VolumeChange(0, "zero", 8192, 12288), "was 8192 bytes"),
        (VolumeChange(0, "0", 8192, 8200), "multiple of 512"),
        (VolumeChange(0, "0", 8192, SIMULATION.volume_bytes_max + 512), "multiple of 512"),
        (VolumeChange(2, "wal", 0, 512), "cannot be added"),
        (VolumeChange(1, "wal", 512, 1024), "cannot be added"),
        (VolumeChange(1, "0", 0, 512), 'is a volume "0"'),
        (VolumeChange(1, "../x", 0, 512), "not allowed"),
        (VolumeChange(1, "wal", 0, 512, {"a": "/" + "x" * 4096}), "4096 bytes"),
    ],
)
def test_what_may_follow_a_volume_of_two_blocks(change: VolumeChange, problem: str) -> None:
    found = change_problem(change, {0: "0"}, {0: 8192}, SIMULATION)
    assert problem in found and bool(problem) == bool(found)


def test_sizes_are_known_at_every_epoch_since_the_start() -> None:
    sizes = VolumeSizes([(0, "0", 8192), (9, "claimed", 0)])
    sizes.add(5, [GROWN])
    sizes.add(8, [ADDED, VolumeChange(0, "0", 12288, 16384)])
    sizes.note_past(2, [VolumeChange(0, "0", 4096, 8192)])
    assert sizes.at(1) == {0: 4096}
    assert sizes.at(2) == sizes.at(4) == {0: 8192}
    assert sizes.at(5) == sizes.at(7) == {0: 12288}
    assert sizes.at(8) == sizes.now == {0: 16384, 1: 4608}
    assert sizes.between(4, 8) == (VolumeChange(0, "0", 8192, 16384), ADDED)
    assert sizes.between(8, 100) == ()
