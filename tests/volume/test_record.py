"""The record codec: every damage is noticed, and no damage is mistaken for anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from geomirror.errors import IntegrityError
from geomirror.volume.record import (
    FIELDS,
    HEADER_BYTES,
    PADS,
    RecordInfo,
    RecordType,
    find_durable_lsn,
    pack_header,
    parse_header,
    parse_record,
    record_bytes,
    scan_records,
)
from tests.volume.hexdump import VECTORS, dump, load

SALT = 0x1122334455667788
LSN = 0x40001000


def record(
    payload: bytes, lsn: int = LSN, previous: int = 0, *, kind: int = 1, durable: int = LSN - 8
) -> tuple[bytes, int]:
    info = RecordInfo(kind, 3, 2, 0, 512, len(payload), 99, len(payload))  # type: ignore[arg-type]
    check = xxh3_64_intdigest(payload) if payload else 0
    header, own = pack_header(
        info,
        lsn=lsn,
        durable_lsn=durable,
        previous=previous,
        payload_check=check,
        salt=SALT,
    )
    return header + payload + PADS[-len(payload) & 7], own


def log(*payloads: bytes) -> bytes:
    whole, check = b"", 0
    for payload in payloads:
        data, check = record(payload, LSN + len(whole), check)
        whole += data
    return whole


def scan(data: bytes, *, check: int | None = 0) -> tuple[list[RecordInfo], int, int]:
    found: list[RecordInfo] = []
    result = scan_records(memoryview(data), LSN, LSN + (1 << 20), SALT, check, found, [])
    return found, result.consumed, result.missing


def test_a_record_is_as_long_as_it_says() -> None:
    for size in (0, 1, 7, 8, 9, 4096):
        data, _ = record(bytes(size))
        assert len(data) == record_bytes(size)
        assert len(data) % 8 == 0


def test_golden_vector() -> None:
    data, _ = record(b"eleven byte", previous=0xAABBCCDD00112233, durable=LSN)
    vector = (VECTORS / "record_v1.hex").read_text()
    assert dump(data) == vector
    assert parse_record(load(vector), LSN, LSN + 4096, SALT) == RecordInfo(
        RecordType.WRITE, 3, 2, LSN, 512, 11, 99, 11
    )


def test_scan_finds_all_records_of_a_log() -> None:
    data = log(b"one", b"", b"three" * 1000)
    found, consumed, missing = scan(data + bytes(100))
    assert [one.payload_length for one in found] == [3, 0, 5000]
    assert found[1].end_lsn == found[2].lsn
    assert (consumed, missing) == (len(data), 0)


def test_scan_of_every_truncation_asks_for_what_is_missing() -> None:
    data = log(b"first", b"second, a longer one", b"")
    whole = scan(data + bytes(HEADER_BYTES))[0]
    ends = [one.end_lsn - LSN for one in whole]
    for size in range(len(data)):
        found, consumed, missing = scan(data[:size])
        assert found == whole[: len(found)]
        assert consumed == max([end for end in ends if end <= size], default=0)
        assert size < consumed + missing <= len(data)


def test_scan_of_a_log_that_arrives_byte_by_byte_sees_each_record_once_whole() -> None:
    data = log(b"a", b"bb", b"")
    counts = [len(scan(data[:size])[0]) for size in range(len(data) + 1)]
    assert counts == sorted(counts)
    assert counts[-1] == 3


def test_every_flipped_bit_of_header_or_payload_is_noticed() -> None:
    data = log(b"payload!", b"after")
    size = HEADER_BYTES + 8
    for bit in range(8 * size):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        found, consumed, missing = scan(bytes(damaged))
        assert (found, consumed, missing) == ([], 0, 0)


def test_a_record_elsewhere_of_another_salt_or_chain_is_invalid() -> None:
    data, check = record(b"payload")
    follower, _ = record(b"x", LSN + len(data), check)
    assert parse_record(data, LSN, LSN + 4096, SALT) is not None
    assert parse_record(data, LSN + 8, LSN + 4096, SALT) is None
    assert parse_record(data, LSN, LSN + 4096, SALT + 1) is None
    assert parse_record(data, LSN, LSN + len(data) - 8, SALT) is None
    assert len(scan(data + follower)[0]) == 2
    other, _ = record(b"x", LSN + len(data), check + 1)
    assert len(scan(data + other)[0]) == 1
    assert len(scan(data, check=5)[0]) == 0
    assert len(scan(data, check=None)[0]) == 1


def test_a_type_of_newer_software_is_neither_read_nor_cut() -> None:
    data, _ = record(b"", kind=77)
    with pytest.raises(IntegrityError, match="unknown type 77"):
        scan(data)
    with pytest.raises(IntegrityError, match="unknown type 77"):
        parse_header(data, LSN, SALT)


def test_proof_of_durability_is_found_behind_damage() -> None:
    first, check = record(b"damaged", durable=LSN)
    second, _ = record(b"after", LSN + len(first), check, durable=LSN + 80)
    assert find_durable_lsn(bytes(len(first)) + second, LSN, SALT) == LSN + 80
    assert find_durable_lsn(bytes(len(first)) + second, LSN, SALT + 1) == 0
    assert find_durable_lsn(bytes(len(first)) + second[:-20], LSN, SALT) == 0
    # A guest's copy of a record in its own data lies elsewhere, so it proves nothing.
    assert find_durable_lsn(bytes(len(first) + 8) + second, LSN, SALT) == 0


@given(st.binary(max_size=4096))
def test_random_bytes_are_never_a_record(data: bytes) -> None:
    found, consumed, missing = scan(data, check=None)
    assert (found, consumed) == ([], 0)
    assert missing in (0, HEADER_BYTES)
    assert find_durable_lsn(data, LSN, SALT) == 0


@given(
    st.lists(st.binary(max_size=64), min_size=1, max_size=6),
    st.data(),
)
def test_a_damaged_log_is_a_prefix_of_the_log(payloads: list[bytes], data: st.DataObject) -> None:
    whole = log(*payloads)
    expected = scan(whole)[0]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(whole) - 1))
        junk = data.draw(st.binary(min_size=1, max_size=32))[: len(whole) - start]
        damaged[start : start + len(junk)] = junk
    found, consumed, _ = scan(bytes(damaged))
    assert found == expected[: len(found)]
    position = 0
    for one in expected[: len(found)]:
        # Only the padding is not covered by a check.
        body = whole[position : position + HEADER_BYTES + one.payload_length]
        assert damaged[position : position + len(body)] == body
        position += record_bytes(one.payload_length)
    assert consumed == position


@given(
    st.sampled_from(list(RecordType)),
    st.integers(0, 255),
    st.integers(0, 65535),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=100),
)
def test_what_is_packed_is_parsed(
    kind: RecordType, flags: int, volume: int, offset: int, wall_ns: int, payload: bytes
) -> None:
    info = RecordInfo(kind, flags, volume, LSN, offset, 5, wall_ns, len(payload))
    header, _ = pack_header(
        info,
        lsn=LSN,
        durable_lsn=1,
        previous=2,
        payload_check=xxh3_64_intdigest(payload) if payload else 0,
        salt=SALT,
    )
    assert len(header) == FIELDS.size + 8
    assert parse_header(header, LSN, SALT) == info
    padded = header + payload + PADS[-len(payload) & 7]
    assert parse_record(padded, LSN, LSN + len(padded), SALT) == info
