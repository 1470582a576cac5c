"""The EPOCH payload: round trip, golden vector, and nonsense that is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.errors import IntegrityError
from geomirror.volume.epoch_record import EPOCH_HEADER_BYTES, decode_epoch, encode_epoch
from geomirror.volume.epoch_table import KIND_ZERO, Epoch, empty_table
from tests.volume.hexdump import VECTORS, dump, load


def epoch() -> Epoch:
    table = empty_table(3)
    table[0] = (0, 0, 0, 1, 5, 0x40001048, 11, 12)
    table[1] = (0, KIND_ZERO, 1, 1000, 6, 0, 0, 0)
    table[2] = (1, 0, 0, 1, 0, 0x40002090, 13, 14)
    return Epoch(
        number=9,
        first_number=7,
        generation=bytes(range(16)),
        first_lsn=0x40001000,
        end_lsn=0x40003000,
        wall_ns=1_700_000_000_000_000_000,
        chain_hash=bytes(range(32)),
        table=table,
        is_asserted=True,
    )


def same(one: Epoch, other: Epoch) -> bool:
    none = empty_table()
    is_same_table = bool(np.array_equal(one.table, other.table))
    return is_same_table and replace(one, table=none) == replace(other, table=none)


def test_golden_vector_and_round_trip() -> None:
    payload = encode_epoch(epoch(), 0x40000FB8)
    vector = (VECTORS / "epoch_record_v1.hex").read_text()
    assert dump(payload) == vector
    decoded, previous = decode_epoch(load(vector))
    assert previous == 0x40000FB8
    assert np.array_equal(decoded.table, epoch().table)
    assert decoded.number, decoded.first_number == (9, 7)
    assert decoded.is_asserted and not decoded.is_mark
    decoded.table["address"][0] = 1  # writable: recovery translates addresses


def test_a_mark_and_an_empty_table_survive() -> None:
    plain = replace(epoch(), table=empty_table(), is_asserted=False, is_mark=True, first_number=9)
    decoded, previous = decode_epoch(encode_epoch(plain, 0))
    assert (decoded.is_mark, decoded.is_asserted, previous) == (True, False, 0)
    assert len(decoded.table) == 0


def test_every_truncation_is_refused() -> None:
    payload = encode_epoch(epoch(), 0)
    for size in range(len(payload)):
        with pytest.raises(IntegrityError):
            decode_epoch(payload[:size])
    with pytest.raises(IntegrityError):
        decode_epoch(payload + b"\0")


def change(offset: int, data: bytes) -> bytes:
    payload = bytearray(encode_epoch(epoch(), 0))
    payload[offset : offset + len(data)] = data
    return bytes(payload)


@pytest.mark.parametrize(
    ("payload", "cause"),
    [
        (change(8, (10).to_bytes(8, "little")), "no range"),
        (change(8, bytes(8)), "no range"),
        (change(40, bytes(8)), "no range"),
        (change(100, b"\x80"), "unknown flags"),
        (change(104, b"\1"), "wrong for"),
        (change(108, b"\1"), "unknown flags"),
        (change(96, (1 << 31).to_bytes(4, "little")), "more than"),
        (change(96, b"\2"), "wrong for 2 entries"),
        (change(112 + 2, b"\2"), "canonical"),
        (change(112 + 8, b"\6"), "canonical"),
        (change(152 + 16, b"\1"), "canonical"),
        (change(152 + 31, b"\1"), "canonical"),
        (change(152 + 4, bytes(4)), "canonical"),
    ],
)
def test_nonsense_is_refused_with_its_cause(payload: bytes, cause: str) -> None:
    with pytest.raises(IntegrityError, match=cause):
        decode_epoch(payload)


def test_more_entries_than_the_bound_are_refused_before_they_are_read() -> None:
    with pytest.raises(IntegrityError, match="more than 2"):
        decode_epoch(encode_epoch(epoch(), 0), entries_max=2)


@given(st.binary(max_size=EPOCH_HEADER_BYTES + 120))
def test_random_bytes_never_do_anything_but_raise(data: bytes) -> None:
    try:
        decoded, previous = decode_epoch(data)
    except IntegrityError:
        return
    assert encode_epoch(decoded, previous) == data


@given(st.integers(0, 2**64 - 1), st.integers(0, 8 * (EPOCH_HEADER_BYTES + 120) - 1))
def test_a_flipped_bit_is_refused_or_read_as_what_it_says(previous: int, bit: int) -> None:
    payload = bytearray(encode_epoch(epoch(), previous))
    payload[bit // 8] ^= 1 << bit % 8
    try:
        decoded, found = decode_epoch(bytes(payload))
    except IntegrityError:
        return
    assert not same(decoded, epoch()) or found != previous
    assert encode_epoch(decoded, found) == payload
