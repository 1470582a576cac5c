"""What a history costs that has all points of the default levels: 8,670 files of undo.

```
 start      headers of all files, tables of the newest      view      tables of all, one index
 per pass   a new pass is found, written, entered           per call  status, timeline, a time
 thinning   a job that looks at everything and merges one group, or none
```
The files are written as a copy writes them, without its waiting for the disk; their points are as
far apart as the levels make them, which in a copy takes a month. Everything runs in this process.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from bench.cells import Cell
from bench.counted_store import CountedStore
from bench.machine import memory_bytes
from bench.options import Options
from bench.report import Result
from bench.rig import require_free
from bench.undo_labels import full_labels
from geomirror.environment import SECOND
from geomirror.limits import BLOCK_BYTES, GIB, KIB, MIB, PRODUCTION
from geomirror.volume.marks import MarkTable
from geomirror.volume.points import At, locate, points_of
from geomirror.volume.store_io import DirectoryStore
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_file import PassLabel, UndoWriter
from geomirror.volume.undo_levels import Level
from geomirror.volume.undo_merge import ThinJob
from geomirror.volume.view import View

NAME = "history"
T = TypeVar("T")
GENERATION = bytes(16)
NOW = 480_000 * 3600 * SECOND
VOLUME_BLOCKS = 16 * GIB // BLOCK_BYTES
VIEW_S_MAX = 1.0
START_S_MAX = 0.5
LOOP_MS_MAX = 5.0
SHORT_LEVELS: Sequence[Level] = ((SECOND, 60 * SECOND), (30 * SECOND, 900 * SECOND))


class _Image:
    size_bytes = VOLUME_BLOCKS * BLOCK_BYTES

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


async def _full(options: Options) -> Result:
    result = Result(NAME, "A history with every point of the default levels")
    rounds, blocks = options.choose_rounds(5, 2), options.choose(100, 4)
    require_free(options.directory, 4 * GIB if not options.is_short else GIB)
    levels = SHORT_LEVELS if options.is_short else PRODUCTION.undo_levels
    found = full_labels(levels, GENERATION, NOW)
    result.settings = {"rounds": rounds, "points": len(found), "blocks_a_pass": blocks}
    await asyncio.to_thread(_measure, options.directory / "resource", found, blocks, rounds, result)
    return result


def _measure(
    directory: Path, found: Sequence[PassLabel], blocks: int, rounds: int, result: Result
) -> None:
    """Blocking."""
    with closing(CountedStore(directory, is_durable=False)) as unsynced:
        chance = random.Random(1)
        written = UndoStore(unsynced, PRODUCTION)
        for label in found:
            written.write(label, lambda file: _fill(file, chance, blocks))
        result.note("stored", written.stored_bytes() / MIB, "MiB")
        del written
    store = DirectoryStore(directory)
    newest = found[-1].to_epoch
    seconds: dict[str, list[float]] = {}
    before = memory_bytes(os.getpid())
    for _ in range(rounds):
        undo = _timed(seconds, "start", partial(UndoStore, store, PRODUCTION))
        undo.found(newest, 1 << 40)
        view = _view(store, undo, undo.history.horizon(newest))
        _timed(seconds, "view", view.prepare)
        _timed(seconds, "lookups", partial(_lookups, undo, newest))
        _timed(seconds, "time", partial(_time, undo, newest))
        _timed(seconds, "thin", ThinJob(store, undo, PRODUCTION, ()).run)
    grown = memory_bytes(os.getpid()) - before
    result.note("RSS grows by, with a view of the oldest", grown / MIB, "MiB")
    result.note("most it ever was", memory_bytes(os.getpid(), "VmHWM") / MIB, "MiB")
    store.close()
    shutil.rmtree(directory)
    result.at_most("start: all undo found", seconds["start"], START_S_MAX, "s")
    result.at_most("view of the oldest point", seconds["view"], VIEW_S_MAX, "s")
    milliseconds = {key: [each * 1000 for each in values] for key, values in seconds.items()}
    result.at_most("lookups of one pass and one status", milliseconds["lookups"], LOOP_MS_MAX, "ms")
    result.at_most("the point of a time", milliseconds["time"], LOOP_MS_MAX, "ms")
    result.median("a job of thinning with nothing to merge", milliseconds["thin"], "ms")


def _view(store: DirectoryStore, undo: UndoStore, epoch: int) -> View:
    entries_max = PRODUCTION.view_entries_max
    return View(epoch, {0: _Image()}, lambda: undo.history, store.open, entries_max)


def _timed(seconds: dict[str, list[float]], name: str, work: Callable[[], T]) -> T:
    began = time.perf_counter()
    found = work()
    seconds.setdefault(name, []).append(time.perf_counter() - began)
    return found


def _fill(writer: UndoWriter, chance: random.Random, blocks: int) -> None:
    """Scattered blocks, half of each compressible."""
    chosen = np.array(sorted(chance.sample(range(VOLUME_BLOCKS), blocks)))
    text = b"scattered block ".ljust(16) * (BLOCK_BYTES // 32)
    writer.add_blocks(0, chosen, b"".join(chance.randbytes(2 * KIB) + text for _ in chosen))


def _lookups(undo: UndoStore, newest: int) -> None:
    """What a pass and a status ask, of a history that is another one with each pass."""
    undo.pending_pass(newest)
    undo.find(newest, newest + 1)
    last = undo.history.whole[-1]
    info = replace(last, from_epoch=newest, to_epoch=newest + 1, name="undo/next")
    history = undo.history.spliced(len(undo.history.whole), 0, [info])
    history.boundaries(newest + 1, newest - PRODUCTION.way_back_epochs_max)
    history.reach_ns(newest + 1, PRODUCTION.undo_levels)
    history.unusable(newest + 1)
    assert history.stored_bytes > undo.stored_bytes()


def _time(undo: UndoStore, newest: int) -> None:
    marks = MarkTable()
    points = points_of(undo.history, newest, NOW, marks)
    locate(points, At(wall_ns=NOW - 600 * SECOND), marks, NOW)


CELLS = [Cell(NAME, _full, "full")]
