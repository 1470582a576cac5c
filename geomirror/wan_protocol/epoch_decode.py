"""Checks one FRAME body of a peer and takes it apart (`docs/wire_format.md`).

The receiver believes nothing: lengths and counts are bounded before anything is allocated, blocks
must be ascending and lie inside their volume, and digests are computed here. What the frame's hash
rejects may be asked for again (`BadFrameError`); anything else that is wrong closes the session.
Deliberately not here: whether the blocks belong to the epoch; the commit's hash decides that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
import zstandard

from geomirror.errors import BadFrameError, LimitExceededError, RemoteProtocolError
from geomirror.limits import BLOCK_BYTES, FRAME_RAW_BYTES_MAX, SECTOR_BYTES, Limits
from geomirror.volume.epoch_table import (
    ENTRY,
    FLAG_PUNCH,
    KIND_DATA,
    KIND_ZERO,
    Table,
)
from geomirror.volume.store import Buffer
from geomirror.wan_protocol.epoch_encode import (
    CODEC_RAW,
    CODEC_ZSTD,
    FRAME_ENTRY,
    FRAME_HEADER,
    KIND_SIZE,
    frame_hash,
)
from geomirror.wan_protocol.frame import FRAME_BODY_BYTES_MAX
from geomirror.wan_protocol.frame_layout import ENTRIES_MAX, RUN_BLOCKS_MAX

_BLOCK_MAX = 1 << 52
_ROW = struct.Struct("<HBBIQQ16s")
"""One `ENTRY`: making the few of a frame one by one is cheaper than eight arrays of fields."""
assert _ROW.size == ENTRY.itemsize
_NO_DIGEST = bytes(16)
_ZERO = xxhash.xxh3_128_digest(bytes(BLOCK_BYTES))
_ZEROS_AS_DATA = "frame has a block of zeros as data; they are sent as runs"


@dataclass(frozen=True)
class DecodedFrame:
    """Checked content of a frame."""

    table: Table = field(repr=False)
    """Canonical: DATA entries of one block each with their digest; `address` is the offset of the
    content in `data`. ZERO runs have address 0. The caller's own: it may be changed."""
    data: bytes = field(repr=False)
    """Contents of the DATA blocks, in order."""
    sizes: dict[int, int]
    """Size in bytes, as it was taken here, of every volume that is named."""


class FrameDecoder:
    """Checks and decompresses the frames of one resource; not to be shared between threads.

    :param volume_bytes: size in bytes of each volume of the resource, by index, where a frame does
        not name another; looked at again for each frame.
    """

    def __init__(self, limits: Limits, volume_bytes: Mapping[int, int]) -> None:
        self._limits = limits
        self._volume_bytes = volume_bytes
        # Kept, because making one costs as much as decompressing a frame.
        self._decompressor = zstandard.ZstdDecompressor()

    def decode(self, body: Buffer) -> DecodedFrame:
        """Check and decompress a frame; nothing of `body` is kept.

        :raises BadFrameError: the content is not what was sent; ask for the frame again.
        :raises LimitExceededError: a count or a length is over its limit.
        :raises RemoteProtocolError: unknown codec or kind, wrong order, outside of the volume.
        """
        view = memoryview(body)
        if len(view) < FRAME_HEADER.size:
            raise RemoteProtocolError(f"frame of {len(view)} bytes has no header")
        if len(view) > FRAME_BODY_BYTES_MAX:
            raise LimitExceededError(f"frame of {len(view)} bytes, at most {FRAME_BODY_BYTES_MAX}")
        header = bytes(view[: FRAME_HEADER.size])
        codec, flags, count, raw_bytes, expected, _base = FRAME_HEADER.unpack(header)
        if codec not in (CODEC_RAW, CODEC_ZSTD) or flags != 0:
            raise RemoteProtocolError(
                f"frame with codec {codec} and flags {flags} was not negotiated"
            )
        if raw_bytes > FRAME_RAW_BYTES_MAX or count > min(
            ENTRIES_MAX, self._limits.epoch_entries_max
        ):
            raise LimitExceededError(
                f"frame announces {count} entries and {raw_bytes} bytes of data"
            )
        data_at = FRAME_HEADER.size + count * FRAME_ENTRY.size
        if count == 0 or data_at > len(view):
            raise RemoteProtocolError(f"frame of {len(view)} bytes cannot have {count} entries")
        entries = view[FRAME_HEADER.size : data_at]
        data = self._decompress(codec, view[data_at:], raw_bytes)
        if frame_hash(header, entries, data) != expected:
            raise BadFrameError("frame does not match its hash")
        rows = list(FRAME_ENTRY.iter_unpack(entries))
        sizes = self._declared_sizes(rows)
        volumes = {row[0] for row in rows}
        known = self._volume_bytes
        if sizes:
            rows = rows[len(sizes) :]
            known = {**known, **sizes}
        table = _expand(rows, data, known)
        return DecodedFrame(table, data, {volume: known[volume] for volume in volumes})

    def _declared_sizes(self, rows: Sequence[tuple[int, ...]]) -> dict[int, int]:
        """Sizes that the frame itself names; their entries are its first ones."""
        sizes: dict[int, int] = {}
        for volume, kind, flags, count, size in rows:
            if kind != KIND_SIZE:
                break
            limits, last = self._limits, next(reversed(sizes), -1)
            if not 0 < size <= limits.volume_bytes_max or size % SECTOR_BYTES or flags or count:
                raise RemoteProtocolError(f"frame names a volume {volume} of {size} bytes")
            if not last < volume < limits.volumes_max:
                raise RemoteProtocolError(f"frame names the size of volume {volume} after {last}")
            sizes[volume] = size
        return sizes

    def _decompress(self, codec: int, wire: memoryview, raw_bytes: int) -> bytes:
        if codec == CODEC_RAW:
            if len(wire) != raw_bytes:
                raise RemoteProtocolError(f"raw frame has {len(wire)} bytes, announced {raw_bytes}")
            return bytes(wire)
        try:
            # python-zstandard allocates what the stream itself announces: that is checked first.
            parameters = zstandard.get_frame_parameters(wire)
            if parameters.content_size != raw_bytes or parameters.window_size > FRAME_RAW_BYTES_MAX:
                raise BadFrameError(
                    f"compressed data announces {parameters.content_size} bytes, frame {raw_bytes}"
                )
            data: bytes = self._decompressor.decompress(
                wire, max_output_size=raw_bytes, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise BadFrameError(f"frame does not decompress: {error}") from error
        if len(data) != raw_bytes:
            raise BadFrameError(f"frame decompresses to {len(data)} bytes, announced {raw_bytes}")
        return data


def decode_frame(body: Buffer, limits: Limits, volume_bytes: Mapping[int, int]) -> DecodedFrame:
    """Decode a single frame; as `FrameDecoder.decode`."""
    return FrameDecoder(limits, volume_bytes).decode(body)


def _expand(
    entries: Iterable[tuple[int, ...]],
    data: bytes,
    volume_bytes: Mapping[int, int],
) -> Table:
    """One table entry per DATA block, with digests; every entry checked against its volume."""
    rows: list[bytes] = []
    add, pack, digest_of = rows.append, _ROW.pack, xxhash.xxh3_128_digest
    offset = 0
    view = memoryview(data)
    after = (-1, 0)
    for volume, kind, flags, count, block in entries:
        size = volume_bytes.get(volume)
        if size is None:
            raise RemoteProtocolError(f"frame names volume {volume}, which is not there")
        blocks = (size + BLOCK_BYTES - 1) // BLOCK_BYTES
        if count == 0 or block > _BLOCK_MAX or block + count > blocks:
            raise RemoteProtocolError(
                f"frame names blocks {block} + {count} of volume {volume}, it has {blocks}"
            )
        if (volume, block) < after:
            raise RemoteProtocolError("frame entries are not ascending")
        after = (volume, block + count)
        if kind == KIND_ZERO and flags & ~FLAG_PUNCH == 0:
            add(pack(volume, kind, flags, count, block, 0, _NO_DIGEST))
            continue
        if kind != KIND_DATA or flags != 0 or count > RUN_BLOCKS_MAX:
            raise RemoteProtocolError(f"frame entry of kind {kind}, flags {flags}, count {count}")
        whole = min(block + count, size // BLOCK_BYTES)
        for number in range(block, whole):
            digest = digest_of(view[offset : offset + BLOCK_BYTES])
            if digest == _ZERO:
                raise RemoteProtocolError(_ZEROS_AS_DATA)
            add(pack(volume, KIND_DATA, 0, 1, number, offset, digest[::-1]))
            offset += BLOCK_BYTES
        if whole < block + count:
            length = size % BLOCK_BYTES
            digest = digest_of(view[offset : offset + length])
            if digest == digest_of(bytes(length)):
                raise RemoteProtocolError(_ZEROS_AS_DATA)
            add(pack(volume, KIND_DATA, 0, 1, whole, offset, digest[::-1]))
            offset += length
    if offset != len(data):
        raise RemoteProtocolError(f"frame has {len(data)} bytes of data, its entries {offset}")
    # Of bytes that are not shared: the receiver changes the addresses.
    return np.frombuffer(bytearray().join(rows), dtype=ENTRY)
