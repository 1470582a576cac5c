"""Frames: what the encoder makes the decoder takes, and nothing that was changed on the way."""

from __future__ import annotations

import itertools
import random
import struct

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from geomirror.errors import BadFrameError, LimitExceededError, RemoteProtocolError
from geomirror.limits import BLOCK_BYTES, FRAME_RAW_BYTES_MAX, PRODUCTION
from geomirror.volume.epoch_table import (
    FLAG_PUNCH,
    HASH_ZERO,
    KIND_DATA,
    KIND_ZERO,
    Epoch,
    Table,
    chain_hash,
    empty_table,
    is_canonical,
)
from geomirror.wan_protocol import epoch_encode
from geomirror.wan_protocol.epoch_decode import DecodedFrame, decode_frame
from geomirror.wan_protocol.epoch_encode import EncodeJob, encode_blocks, frame_hash

GENERATION = b"g" * 16
SIZES = {0: 1 << 30, 3: 40 * BLOCK_BYTES + 1024}
SEGMENT = PRODUCTION.segment_bytes


class FakeJournal:
    """Contents at journal addresses, with a header's gap between them."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.base = SEGMENT - 20_000
        self.reads: list[tuple[int, int]] = []

    def add(self, content: bytes) -> int:
        self.data += b"\xff" * 72
        if (self.base + len(self.data)) // SEGMENT != (
            self.base + len(self.data) + len(content) - 1
        ) // SEGMENT:
            self.data += bytes(SEGMENT - (self.base + len(self.data)) % SEGMENT)
        self.data += content
        return self.base + len(self.data) - len(content)

    def read(self, address: int, length: int) -> bytes:
        assert address // SEGMENT == (address + length - 1) // SEGMENT
        self.reads.append((address, length))
        return bytes(self.data[address - self.base : address - self.base + length])


def make_epoch(
    journal: FakeJournal, blocks: dict[tuple[int, int], bytes | int], number: int = 5
) -> Epoch:
    """An epoch of DATA contents and ZERO counts; addresses in a shuffled journal order."""
    keys = sorted(blocks)
    order = random.Random(number).sample(keys, len(keys))
    addresses = {
        key: journal.add(content) for key in order if isinstance(content := blocks[key], bytes)
    }
    table = empty_table(len(keys))
    for row, key in enumerate(keys):
        content = blocks[key]
        if isinstance(content, bytes):
            digest = xxhash.xxh3_128_intdigest(content)
            table[row] = (
                *(key[0], KIND_DATA, 0, 1, key[1], addresses[key]),
                *(digest % 2**64, digest >> 64),
            )
        else:
            table[row] = (key[0], KIND_ZERO, FLAG_PUNCH, content, key[1], 0, 0, 0)
    return Epoch(number, number, GENERATION, number * 100, number * 100 + 100, 77, b"h" * 32, table)


def decode_all(frames: list[bytes]) -> tuple[Table, list[bytes]]:
    tables, contents = [], []
    for body in frames:
        decoded = decode_frame(body, PRODUCTION, SIZES)
        assert len(decoded.data) <= FRAME_RAW_BYTES_MAX
        assert is_canonical(decoded.table)
        tables.append(decoded.table)
        contents += contents_of(decoded)
    return np.concatenate(tables), contents


def contents_of(decoded: DecodedFrame) -> list[bytes]:
    rows = decoded.table[decoded.table["kind"] == KIND_DATA]
    cuts = [*rows["address"].tolist(), len(decoded.data)]
    return [decoded.data[a:b] for a, b in itertools.pairwise(cuts)]


def text(seed: int, length: int = BLOCK_BYTES) -> bytes:
    return (b"row %08d of a table; " % seed * (length // 20 + 1))[:length]


def noise(seed: int, length: int = BLOCK_BYTES) -> bytes:
    return random.Random(seed).randbytes(length)


def same_but_addresses(left: Table, right: Table) -> bool:
    fields = [name for name in left.dtype.names or () if name != "address"]
    return bool(np.array_equal(left[fields], right[fields]))


def test_an_epoch_comes_out_as_it_went_in() -> None:
    journal = FakeJournal()
    blocks: dict[tuple[int, int], bytes | int] = {(0, n): text(n) for n in range(3, 60)}
    blocks |= {(0, 100 + 2 * n): noise(n) for n in range(40)}
    blocks |= {(0, 1000): 5000, (3, 2): 7, (3, 39): noise(1), (3, 40): noise(2, 1024)}
    epoch = make_epoch(journal, blocks)
    job = EncodeJob([epoch], journal.read, volume_bytes=SIZES)
    job.run()
    table, contents = decode_all(job.result.frames)
    assert same_but_addresses(table, epoch.table)
    assert contents == [
        content for _, content in sorted(blocks.items()) if content not in (5000, 7)
    ]
    assert job.result.entries == len(epoch.table)
    assert job.result.raw_bytes == sum(map(len, contents))
    assert job.result.wire_bytes == sum(map(len, job.result.frames)) < job.result.raw_bytes
    assert job.result.table_hash == b""
    args = (HASH_ZERO, GENERATION, 5, 500, 600)
    assert chain_hash(*args, table) == chain_hash(*args, epoch.table)


def test_journal_reads_are_coalesced() -> None:
    journal = FakeJournal()
    epoch = make_epoch(journal, {(0, n): noise(n) for n in range(500)})
    job = EncodeJob([epoch], journal.read, volume_bytes=SIZES)
    job.run()
    assert len(journal.reads) <= 4
    assert max(length for _, length in journal.reads) <= epoch_encode.READ_BYTES_MAX + BLOCK_BYTES


def test_a_fold_carries_the_newest_content_and_its_own_hash() -> None:
    journal = FakeJournal()
    older = make_epoch(journal, {(0, 1): text(1), (0, 2): text(2), (0, 9): 100}, number=5)
    newer = make_epoch(journal, {(0, 2): noise(3), (0, 50): text(4)}, number=6)
    job = EncodeJob(lambda: [older, newer], journal.read, volume_bytes=SIZES)
    job.run()
    table, contents = decode_all(job.result.frames)
    assert contents == [text(1), noise(3), text(4)]
    assert table["block"].tolist() == [1, 2, 9, 50, 51]
    assert table["count"].tolist() == [1, 1, 41, 1, 58]
    assert (job.result.first_number, job.result.number) == (5, 6)
    assert (job.result.first_lsn, job.result.end_lsn) == (500, 700)
    assert job.result.table_hash == chain_hash(HASH_ZERO, GENERATION, 6, 500, 700, table)


def test_compressible_data_is_compressed_and_noise_is_not() -> None:
    plain = encode_blocks([(0, 0, b"".join(text(n) for n in range(16)))])
    assert len(plain) == 1 and plain[0][0] == epoch_encode.CODEC_ZSTD
    assert len(plain[0]) < 8000
    raw = encode_blocks([(0, 0, noise(1, 65536))])
    assert raw[0][0] == epoch_encode.CODEC_RAW
    assert len(raw[0]) == 24 + 16 + 65536


def test_copied_content_has_its_zeros_sent_as_runs() -> None:
    content = text(1) + bytes(3 * BLOCK_BYTES) + text(2)
    short = SIZES[3] // BLOCK_BYTES
    frames = encode_blocks([(3, short - 1, bytes(5120)), (0, 10, content)], [(0, 20, 2**17)])
    table, contents = decode_all(frames)
    assert table["block"].tolist() == [10, 11, 14, 20, short - 1]
    assert table["kind"].tolist() == [0, 1, 0, 1, 1]
    assert table["count"].tolist() == [1, 3, 1, 2**17, 2]
    assert contents == [text(1), text(2)]


def test_many_zero_runs_are_split_into_frames_within_the_limit() -> None:
    frames = encode_blocks([], [(0, 2 * n, 1) for n in range(2500)])
    table, _ = decode_all(frames)
    assert len(frames) == 3
    assert len(table) == 2500


@pytest.fixture(scope="module")
def frame() -> bytes:
    (body,) = encode_blocks([(0, 5, text(5) + text(6)), (0, 9, text(7))], [(0, 30, 4)])
    assert body[0] == epoch_encode.CODEC_ZSTD
    return body


def test_every_truncation_is_refused(frame: bytes) -> None:
    for length in range(len(frame)):
        with pytest.raises(RemoteProtocolError):
            decode_frame(frame[:length], PRODUCTION, SIZES)
    with pytest.raises(RemoteProtocolError):
        decode_frame(frame + b"\0", PRODUCTION, SIZES)


@pytest.mark.parametrize("is_raw", [False, True])
def test_no_flipped_bit_is_accepted(frame: bytes, is_raw: bool) -> None:
    body = encode_blocks([(3, 40, noise(9, 1024))], [(3, 1, 2)])[0] if is_raw else frame
    before = decode_frame(body, PRODUCTION, SIZES)
    for bit in range(len(body) * 8):
        bad = bytearray(body)
        bad[bit // 8] ^= 1 << (bit % 8)
        try:
            after = decode_frame(bad, PRODUCTION, SIZES)
        except RemoteProtocolError:
            continue
        # A zstd stream has a few bits without meaning: what comes out must be the very same.
        assert not is_raw
        assert after.data == before.data
        assert np.array_equal(after.table, before.table)


def forge(
    entries: list[tuple[int, int, int, int, int]],
    data: bytes,
    *,
    codec: int = 0,
    flags: int = 0,
    raw_bytes: int | None = None,
    wire: bytes | None = None,
    count: int | None = None,
) -> bytes:
    """A frame with a correct hash and whatever else is asked for."""
    packed = b"".join(struct.pack("<HBBIQ", *entry) for entry in entries)
    count = len(entries) if count is None else count
    raw_bytes = len(data) if raw_bytes is None else raw_bytes
    header = struct.pack("<BBHIQQ", codec, flags, count, raw_bytes, 0, 0)
    digest = frame_hash(header, packed, data)
    header = struct.pack("<BBHIQQ", codec, flags, count, raw_bytes, digest, 0)
    return header + packed + (data if wire is None else wire)


BLOCK = noise(1)
BOMB = zstandard.compress(bytes(1 << 28), 3)
HOSTILE = {
    "unknown codec": forge([(0, 0, 0, 1, 1)], BLOCK, codec=3),
    "prefix not negotiated": forge([(0, 0, 0, 1, 1)], BLOCK, codec=2),
    "flags": forge([(0, 0, 0, 1, 1)], BLOCK, flags=1),
    "no entries": forge([], b""),
    "more entries than bytes": forge([(0, 1, 0, 1, 1)], b"", count=900),
    "unknown kind": forge([(0, 3, 0, 1, 1)], b""),
    "same not negotiated": forge([(0, 2, 0, 1, 1)], b""),
    "data with flags": forge([(0, 0, 1, 1, 1)], BLOCK),
    "zero with unknown flags": forge([(0, 1, 2, 1, 1)], b""),
    "count 0": forge([(0, 1, 0, 0, 1)], b""),
    "run too long": forge([(0, 0, 0, 17, 1)], BLOCK * 16),
    "descending": forge([(0, 1, 0, 1, 9), (0, 1, 0, 1, 8)], b""),
    "overlap": forge([(0, 1, 0, 5, 9), (0, 1, 0, 1, 13)], b""),
    "descending volume": forge([(3, 1, 0, 1, 1), (0, 1, 0, 1, 8)], b""),
    "unknown volume": forge([(1, 1, 0, 1, 1)], b""),
    "beyond the end": forge([(3, 1, 0, 2, 40)], b""),
    "far beyond the end": forge([(0, 1, 0, 2**32 - 1, 2**64 - 1)], b""),
    "too little data": forge([(0, 0, 0, 2, 1)], BLOCK),
    "too much data": forge([(0, 0, 0, 1, 1)], BLOCK * 2),
    "data for zero": forge([(0, 1, 0, 1, 1)], BLOCK),
    "zeros as data": forge([(0, 0, 0, 1, 1)], bytes(BLOCK_BYTES)),
    "short zeros as data": forge([(3, 0, 0, 1, 40)], bytes(1024)),
    "long last block": forge([(3, 0, 0, 1, 40)], BLOCK),
    "raw length differs": forge([(0, 0, 0, 1, 1)], BLOCK, raw_bytes=4095),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_frame_is_refused_for_good(name: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_frame(HOSTILE[name], PRODUCTION, SIZES)
    assert not isinstance(caught.value, BadFrameError)


@pytest.mark.parametrize(
    "body",
    [
        forge([(0, 0, 0, 1, 1)], BLOCK, raw_bytes=65_537),
        forge([(0, 1, 0, 1, n) for n in range(1001)], b""),
        bytes(81_921),
    ],
)
def test_a_size_over_a_limit_is_refused(body: bytes) -> None:
    with pytest.raises(LimitExceededError):
        decode_frame(body, PRODUCTION, SIZES)


def test_a_decompression_bomb_is_refused_before_memory_is_taken() -> None:
    for raw_bytes in (4096, 65_536):
        body = forge([(0, 0, 0, 1, 1)], b"", codec=1, raw_bytes=raw_bytes, wire=BOMB)
        with pytest.raises(BadFrameError, match="announces 268435456"):
            decode_frame(body, PRODUCTION, SIZES)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24))
    body = forge([(0, 0, 0, 1, 1)], b"", codec=1, raw_bytes=4096, wire=unsized)
    with pytest.raises(BadFrameError):
        decode_frame(body, PRODUCTION, SIZES)


def test_a_frame_of_other_content_is_asked_for_again() -> None:
    body = bytearray(forge([(0, 0, 0, 1, 1)], BLOCK))
    body[-1] ^= 1
    with pytest.raises(BadFrameError):
        decode_frame(body, PRODUCTION, SIZES)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.booleans(), st.data())
def test_garbage_is_refused_with_a_typed_error(
    garbage: bytes, is_framed: bool, data: st.DataObject
) -> None:
    if is_framed:
        entry = st.tuples(
            st.sampled_from([0, 1, 3]),
            st.integers(0, 3),
            st.integers(0, 2),
            st.integers(0, 20),
            st.integers(0, 60),
        )
        entries = data.draw(st.lists(entry, max_size=6))
        garbage = forge(entries, garbage, codec=data.draw(st.integers(0, 2)))
    try:
        decoded = decode_frame(garbage, PRODUCTION, SIZES)
    except RemoteProtocolError:
        return
    assert is_framed
    assert len(decoded.table) > 0 and is_canonical(decoded.table)
    assert sum(map(len, contents_of(decoded))) == len(decoded.data)
