"""Bodies of data frames: bounded, in order, inside the volume, and the same when encoded again."""

from __future__ import annotations

import struct
import tracemalloc
from functools import cache

import xxhash
import zstandard

from geomirror.errors import BadFrameError, LimitExceededError, RemoteProtocolError
from geomirror.limits import BLOCK_BYTES, FRAME_RAW_BYTES_MAX, PRODUCTION
from geomirror.volume.epoch_table import KIND_DATA, is_canonical
from geomirror.wan_protocol.epoch_decode import DecodedFrame, decode_frame
from geomirror.wan_protocol.epoch_encode import (
    FRAME_HEADER,
    FrameBuilder,
    FrameEncoder,
    frame_hash,
)
from tests.fuzz.source import Source

VOLUMES = {0: 64 * BLOCK_BYTES, 3: 5 * BLOCK_BYTES + 512}
MEMORY_MAX = FRAME_RAW_BYTES_MAX * 2 + 1000 * 400 + (1 << 18)
"""Two copies of the data, a thousand rows, and zstd's own."""
_ENTRY = struct.Struct("<HBBIQ")
_RAW, _SEALED, _PACKED = range(3)
"""As it is; with a right hash over raw data; with a right hash over data that is compressed."""
INPUT_BYTES_MAX = 12 << 10


def seeds() -> list[bytes]:
    """Good frames of raw data, of compressed data, and of zeros."""
    encoder = FrameEncoder(1)
    builder = FrameBuilder(encoder)
    builder.add_run(0, 7, [bytes([1]) * 4096, b"ab" * 2048])
    builder.add_zero(0, 20, 30, 1)
    builder.add_run(3, 4, [bytes(range(256)) * 16, b"e" * 512])
    builder.flush()
    entries = _ENTRY.pack(0, 0, 0, 1, 5) + _ENTRY.pack(3, 1, 1, 2, 1) + _ENTRY.pack(3, 0, 0, 1, 5)
    data = b"q" * (4096 + 512)
    return [
        *(bytes([_RAW, 0]) + body for body in encoder.frames),
        bytes([_SEALED, 3]) + entries + data,
        bytes([_PACKED, 3]) + entries + data,
        bytes([_SEALED, 1]) + _ENTRY.pack(0, 1, 0, 64, 0),
        bytes([_PACKED, 1]) + _ENTRY.pack(0, 0, 0, 2, 0) + b"z" * 8192,
    ]


def run(data: bytes) -> None:
    """Decode within a bound of memory; then encode what was accepted, and decode that."""
    body = _body(Source(data))
    tracemalloc.start()
    try:
        found = decode_frame(body, PRODUCTION, VOLUMES)
    except (BadFrameError, LimitExceededError, RemoteProtocolError):
        found = None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= MEMORY_MAX, f"{peak} bytes for a frame of {len(body)}"
    if found is not None:
        _check(found)


def _check(found: DecodedFrame) -> None:
    table = found.table
    assert is_canonical(table)
    at = 0
    encoder = FrameEncoder(1)
    builder = FrameBuilder(encoder)
    for row in table.tolist():
        volume, kind, flags, count, block, address, low, high = row
        end = (block + count) * BLOCK_BYTES
        assert end - BLOCK_BYTES < VOLUMES[volume]
        if kind != KIND_DATA:
            assert (address, low, high) == (0, 0, 0)
            builder.add_zero(volume, block, count, flags)
            continue
        content = found.data[at : at + min(BLOCK_BYTES, VOLUMES[volume] - block * BLOCK_BYTES)]
        assert address == at
        assert any(content), "zeros as data"
        assert xxhash.xxh3_128_intdigest(content) == low | high << 64
        builder.add_run(volume, block, [content])
        at += len(content)
    assert at == len(found.data) <= FRAME_RAW_BYTES_MAX
    builder.flush()
    again = [decode_frame(body, PRODUCTION, VOLUMES) for body in encoder.frames]
    assert b"".join(each.data for each in again) == found.data
    assert sum(len(each.table) for each in again) == len(table)


@cache
def _compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=1, write_checksum=False, write_dict_id=False)


def _body(source: Source) -> bytes:
    how, count = source.below(3), source.number()
    if how == _RAW:
        return source.rest()
    entries = source.take(count * _ENTRY.size)
    data = source.rest()
    wire = _compressor().compress(data) if how == _PACKED else data
    codec = int(how == _PACKED)
    header = FRAME_HEADER.pack(codec, 0, count, len(data), 0, 0)
    hashed = frame_hash(header, entries, data)
    return FRAME_HEADER.pack(codec, 0, count, len(data), hashed, 0) + entries + wire
