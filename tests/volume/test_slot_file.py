"""A value in two slots: replaced as a whole, there after every crash and beside any damage."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from geomirror.errors import StorageError
from geomirror.volume.slot_file import BODY_BYTES_MAX, SLOT_BYTES, SlotFile, pack, parse
from tests.sim.disk import CrashStyle, SimStore
from tests.volume.hexdump import load

VECTORS = Path(__file__).parents[1] / "vectors"
LOSE_ALL = CrashStyle(0.0)
NAME = "standing"


def test_golden_vector_is_read_for_ever() -> None:
    slot = load((VECTORS / "slot_v1.hex").read_text())
    assert parse(slot) == (42, b'{"value": 7}')
    assert pack(b'{"value": 7}', 42) == slot


def test_a_value_is_durable_when_its_job_has_run() -> None:
    store = SimStore("slots")
    file = SlotFile(store, NAME)
    assert file.load() is None
    for body in (b"first", b"second", b"third"):
        file.write_job(body).run()
        store.crash(lose_nothing=False, style=LOSE_ALL)
        file = SlotFile(store, NAME)
        assert file.load() == body


def test_a_crash_inside_a_write_leaves_the_old_or_the_new_value() -> None:
    seen = set()
    for seed in range(200):
        store = SimStore(f"slots/{seed}")
        file = SlotFile(store, NAME)
        file.write(b"old")
        stop_at = seed % 6 + 1

        def stop(operation: str, name: str) -> None:
            nonlocal stop_at
            stop_at -= 1
            if not stop_at:
                raise KeyboardInterrupt

        store.on_operation = stop
        with contextlib.suppress(KeyboardInterrupt):
            file.write(b"new" * 5000)
        store.on_operation = None
        store.crash(lose_nothing=seed % 3 == 0)
        found = SlotFile(store, NAME).load()
        assert found in (b"old", b"new" * 5000)
        seen.add(found)
    assert len(seen) == 2


@pytest.mark.parametrize("slot", [0, 1])
def test_damage_to_one_slot_takes_nothing_back(slot: int) -> None:
    for bit in range(0, 8 * 60, 7):
        store = SimStore("slots")
        file = SlotFile(store, NAME)
        file.write(b"old value")
        file.write(b"new value")
        store.flip_bit(NAME, 8 * slot * SLOT_BYTES + bit)
        assert SlotFile(store, NAME).load() == b"new value"


def test_without_a_valid_slot_there_is_no_value_and_the_next_one_counts() -> None:
    store = SimStore("slots")
    file = SlotFile(store, NAME)
    file.write(b"value")
    for slot in (0, 1):
        store.flip_bit(NAME, 8 * slot * SLOT_BYTES + 300)
    file = SlotFile(store, NAME)
    assert file.load() is None
    file.write(b"again")
    assert SlotFile(store, NAME).load() == b"again"


def test_a_value_has_to_fit() -> None:
    file = SlotFile(SimStore("slots"), NAME)
    file.write(bytes(BODY_BYTES_MAX))
    with pytest.raises(StorageError, match="fit in a slot"):
        file.write(bytes(BODY_BYTES_MAX + 1))
    assert file.load() == bytes(BODY_BYTES_MAX)
