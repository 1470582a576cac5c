"""What it takes to go back over an hour of a database's writes: time, and the rate of it.

The storage of one copy in this process plays the hour on a clock of its own, thinned as a daemon
does, then goes back to its beginning: tail to a branch, before-images to the volume, all synced.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import replace

from bench.copy_engine import CopyEngine
from bench.database_trace import EPOCHS_PER_SECOND, DatabaseTrace
from bench.machine import sync_file_system
from bench.options import Options
from bench.report import Result
from bench.rig import require_free
from geomirror.environment import SECOND
from geomirror.limits import BLOCK_BYTES, GIB, MIB, PRODUCTION, TIB
from geomirror.wan_protocol.history_upkeep import THIN_INTERVAL_NS

NAME = "history"
THIN_EVERY = THIN_INTERVAL_NS // SECOND * EPOCHS_PER_SECOND
FILL_BLOCKS = 8 * MIB // BLOCK_BYTES


async def rewind(options: Options) -> Result:
    """An hour of a database, and back to its beginning."""
    result = Result(NAME, "A rewind over an hour of a database's writes")
    size, seconds = options.choose(512 * MIB, 16 * MIB), options.choose(3600, 15)
    require_free(options.directory, 8 * size + 4 * GIB)
    result.settings = {"simulated_seconds": seconds, "volume_bytes": size}
    await asyncio.to_thread(_play, options, size, seconds, result)
    return result


def _play(options: Options, size: int, seconds: int, result: Result) -> None:
    """Blocking."""
    limits = replace(PRODUCTION, undo_bytes_max=TIB)
    copy = CopyEngine(options.directory / "copy", size, 2 * GIB, limits, is_durable=False)
    trace = DatabaseTrace(size)
    blocks = list(trace.fill().items())
    for at in range(0, len(blocks), FILL_BLOCKS):
        copy.receive(dict(blocks[at : at + FILL_BLOCKS]), 1 / EPOCHS_PER_SECOND)
        _apply(copy)
    epoch, before, logical = copy.engine.applied_epoch, _digest(copy), copy.logical_bytes
    copy.marked.append(epoch)  # An operator's "before"; without it thinning merges it away.
    changed: set[int] = set()
    for number in range(seconds * EPOCHS_PER_SECOND):
        content = trace.epoch()
        changed.update(content)
        copy.receive(content, 1 / EPOCHS_PER_SECOND)
        _apply(copy)
        if number % THIN_EVERY == 0:
            copy.thin()
    logical = copy.logical_bytes - logical
    undo = copy.engine.undo.stored_bytes()
    sync_file_system(options.directory)
    began = time.perf_counter()
    job = copy.engine.rollback_job(epoch, "tail", wall_ns=copy.wall_ns)
    job.run()
    copy.engine.complete_rollback(job)
    sync_file_system(options.directory)
    taken = time.perf_counter() - began
    result.median("rewind", [taken], "s")
    result.note("different blocks put back", len(changed) * BLOCK_BYTES / MIB / taken, "MiB/s")
    result.note("writes gone back over", logical / MIB / taken, "MiB/s")
    result.note("different blocks", len(changed) * BLOCK_BYTES / MIB, "MiB")
    result.note("before-images of the hour", undo / MIB, "MiB")
    result.at_least("volume as at the beginning", [float(_digest(copy) == before)], 1.0)
    copy.close()


def _apply(copy: CopyEngine) -> None:
    while (job := copy.next_pass()) is not None:
        job.run()
        copy.applied(job)


def _digest(copy: CopyEngine) -> bytes:
    image, found = copy.engine.images[0], hashlib.sha256()
    for offset in range(0, image.size_bytes, MIB):
        found.update(image.read(offset, min(MIB, image.size_bytes - offset)))
    return found.digest()
