"""How the entries of a table are divided into frames; whole arrays at a time.

```
 rows:     DATA 7  DATA 8  ZERO 20…99  DATA 120 │ DATA 121 …
 entries:  [7 × 2]         [20 × 80]   [120 × 1]│ [121 × n]      a run does not cross frames
 data:      0       4096                8192    │ 12288          offsets in the window's contents
```
Deliberately not here: contents, and the encoding of a frame (`epoch_encode`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geomirror.limits import BLOCK_BYTES, FRAME_RAW_BYTES_MAX
from geomirror.volume.arrays import Indices, run_lengths
from geomirror.volume.epoch_table import KIND_DATA, Table

RUN_BLOCKS_MAX = FRAME_RAW_BYTES_MAX // BLOCK_BYTES
ENTRIES_MAX = 1000
"""Entries in one frame; 16 kB of them, what `FRAME_OVERHEAD_BYTES_MAX` has room for."""
FRAME_ENTRY_TYPE = np.dtype(
    [("volume", "<u2"), ("kind", "u1"), ("flags", "u1"), ("count", "<u4"), ("block", "<u8")]
)


@dataclass(frozen=True)
class FrameSlice:
    """One frame of a window."""

    entry_count: int
    entries: bytes
    """As they go over the wire."""
    start: int
    stop: int
    """Of the contents of the window, laid out in order, this part is the frame's data."""


class WindowLayout:
    """Divides some rows of a table, ascending, into frames.

    :param volume_bytes: size of each volume, by index: the last block of one may be short.
    :param entries_max: of one frame.
    """

    def __init__(
        self, window: Table, volume_bytes: Mapping[int, int], entries_max: int = ENTRIES_MAX
    ) -> None:
        self._window = window
        self._entries_max = entries_max
        self._is_data = window["kind"] == KIND_DATA
        lengths = np.where(self._is_data, BLOCK_BYTES, 0)
        for volume, size in volume_bytes.items():
            if size % BLOCK_BYTES:
                is_last = (window["volume"] == volume) & (window["block"] == size // BLOCK_BYTES)
                lengths[is_last & self._is_data] = size % BLOCK_BYTES
        self._stops = np.cumsum(lengths)
        self._starts = self._stops - lengths
        self.data_bytes = int(self._stops[-1]) if len(window) else 0

    def data_places(self) -> tuple[Indices, Indices, Indices]:
        """For each DATA row: address of its content, length, and offset in the laid out data."""
        rows = self._is_data.nonzero()[0]
        starts = self._starts[rows]
        return self._window["address"][rows].astype(np.int64), self._stops[rows] - starts, starts

    def frames(self) -> Iterator[FrameSlice]:
        """All frames, in order."""
        total = len(self._window)
        firsts = self._first_rows()
        is_head = self._breaks_run()
        is_head[firsts] = True
        heads = is_head.nonzero()[0]
        entries = self._entries(heads).tobytes()
        bounds = [*np.searchsorted(heads, firsts).tolist(), len(heads)]
        places = [*self._starts[firsts].tolist(), self.data_bytes] if total else []
        size = FRAME_ENTRY_TYPE.itemsize
        for index in range(len(firsts)):
            first, last = bounds[index], bounds[index + 1]
            part = entries[first * size : last * size]
            yield FrameSlice(last - first, part, places[index], places[index + 1])

    def _first_rows(self) -> Indices:
        """Where frames begin: every 16 data blocks, and before too many entries."""
        total = len(self._window)
        if total == 0:
            return np.empty(0, dtype=np.int64)
        before = np.cumsum(self._is_data) - self._is_data
        is_first = self._is_data & (before % RUN_BLOCKS_MAX == 0) & (before > 0)
        is_first[0] = True
        firsts: Indices = is_first.nonzero()[0]
        lengths = run_lengths(firsts, total)
        if int(lengths.max()) <= self._entries_max:
            return firsts
        found = [
            row
            for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True)
            for row in range(first, first + length, self._entries_max)
        ]
        return np.array(found, dtype=np.int64)

    def _breaks_run(self) -> npt.NDArray[np.bool_]:
        """Whether each row is anything but the next data block after the row before it."""
        window, is_data = self._window, self._is_data
        breaks = np.ones(len(window), dtype=np.bool_)
        is_joined = is_data[1:] & is_data[:-1]
        is_joined &= window["volume"][1:] == window["volume"][:-1]
        is_joined &= window["block"][1:] == window["block"][:-1] + np.uint64(1)
        np.logical_not(is_joined, out=breaks[1:])
        return breaks

    def _entries(self, heads: Indices) -> npt.NDArray[np.void]:
        rows = self._window[heads]
        entries = np.zeros(len(heads), dtype=FRAME_ENTRY_TYPE)
        for name in ("volume", "kind", "block"):
            entries[name] = rows[name]
        is_data = rows["kind"] == KIND_DATA
        if len(heads):
            lengths = run_lengths(heads, len(self._window))
            entries["count"] = np.where(is_data, lengths, rows["count"])
        entries["flags"] = np.where(is_data, 0, rows["flags"])
        return entries
