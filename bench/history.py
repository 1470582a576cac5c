"""What looking back costs a copy: bytes written, bytes kept at each level, time to apply.

```
 levels   a secondary's storage under a database's writes, hours of them on a clock of its own:
          bytes are exact, and nobody waits for an hour; the levels' ages are shortened, their
          steps are not
 apply    the same passes over the same blocks in turns, with before-images and without
```
Everything runs in this process (`copy_engine`): no link, no daemon, no primary beside it.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

from bench import full_history
from bench.cells import Cell
from bench.copy_engine import CopyEngine
from bench.counted_store import IMAGE, JOURNAL, UNDO
from bench.database_trace import EPOCHS_PER_SECOND, DatabaseTrace
from bench.machine import sync_file_system
from bench.options import Options
from bench.report import Result
from bench.rewind_history import rewind
from bench.rig import require_free
from geomirror.environment import SECOND
from geomirror.limits import BLOCK_BYTES, GIB, KIB, MIB, PRODUCTION, TIB, Limits
from geomirror.volume.undo_file import PassInfo
from geomirror.volume.undo_levels import level_of
from geomirror.wan_protocol.history_upkeep import THIN_INTERVAL_NS

NAME = "history"
COLUMNS = ["trace", "step", "kept for", "points", "MiB", "MiB/h", "part of churn"]
RATIO_MIN = 0.5
STEPS_S = (1, 30, 300, 3600)
FULL_AGES_S = (600, 2400, 9000, 16_200)
"""Each level is long enough for dozens of its steps, but the last: a few."""
SHORT_AGES_S = (15, 65, 70, 75)
THIN_EVERY = THIN_INTERVAL_NS // SECOND * EPOCHS_PER_SECOND


async def _levels(options: Options) -> Result:
    result = Result(NAME, "A copy's history under a database's writes, by level")
    ages = SHORT_AGES_S if options.is_short else FULL_AGES_S
    size = options.choose(512 * MIB, 16 * MIB)
    require_free(options.directory, 4 * size + 2 * GIB)
    levels = tuple((s * SECOND, a * SECOND) for s, a in zip(STEPS_S, ages, strict=True))
    limits = replace(PRODUCTION, undo_levels=levels, undo_bytes_max=TIB, undo_passes_max=1 << 20)
    result.settings = {"simulated_seconds": ages[-1], "volume_bytes": size}
    result.columns = COLUMNS
    await asyncio.to_thread(_play_levels, options.directory / "copy", size, limits, result)
    return result


def _play_levels(directory: Path, size: int, limits: Limits, result: Result) -> None:
    """Blocking: minutes of passes, one after the other."""
    copy = CopyEngine(directory, size, 2 * GIB, limits, is_durable=False)
    trace = DatabaseTrace(size)
    _fill(copy, trace)
    first, logical = copy.written(), copy.logical_bytes
    seconds, thinned = limits.undo_levels[-1][1] // SECOND, 0
    for number in range(seconds * EPOCHS_PER_SECOND):
        copy.receive(trace.epoch(), 1 / EPOCHS_PER_SECOND)
        _apply(copy)
        if number % THIN_EVERY == 0:
            thinned += copy.thin()
    thinned += copy.thin()
    written = {kind: count - first.get(kind, 0) for kind, count in copy.written().items()}
    logical = copy.logical_bytes - logical
    passes = copy.engine.undo.passes()
    copy.close()
    shutil.rmtree(directory)
    churn = logical / seconds
    rates = _note_levels(result, passes, limits, churn)
    result.note("churn", churn * 3600 / MIB, "MiB/h")
    for name, count in (
        ("journal", written[JOURNAL]),
        ("image", written[IMAGE]),
        ("before-images", written[UNDO] - thinned),
        ("thinning of history", thinned),
    ):
        result.note(f"written per byte received: {name}", count / logical, "x")
    result.note("written per byte received: all", sum(written.values()) / logical, "x")
    kept, start = 0.0, 0.0
    for rate, (_, age_ns) in zip(rates, PRODUCTION.undo_levels, strict=True):
        kept += rate * (age_ns / SECOND - start)
        start = age_ns / SECOND
        result.note(f"history of {_age(age_ns)} at this churn, default levels", kept / MIB, "MiB")


def _age(age_ns: int) -> str:
    hours = age_ns // SECOND // 3600
    return f"{hours} h" if hours <= 24 else f"{hours // 24} d"


def _note_levels(
    result: Result, passes: list[PassInfo], limits: Limits, churn: float
) -> list[float]:
    """One row a level; bytes kept for each second of it. The first one is without its unthinned."""
    newest_ns = max(each.wall_ns for each in passes)
    rates, start_ns = [], 0
    for number, (step_ns, age_ns) in enumerate(limits.undo_levels):
        ages = ((each, newest_ns - each.wall_ns) for each in passes)
        found = [each for each, age in ages if level_of(age, limits.undo_levels) == number]
        if number == 0:
            # The newest are not merged to a point a second yet.
            start_ns = limits.undo_settled_ns
            found = [each for each in found if newest_ns - each.wall_ns >= start_ns]
        span_s = (age_ns - start_ns) / SECOND
        stored = sum(each.stored_bytes for each in found)
        rates.append(stored / span_s)
        result.rows.append(
            [
                "database",
                f"{step_ns // SECOND} s",
                f"{span_s:.0f} s",
                float(len(found)),
                stored / MIB,
                rates[-1] * 3600 / MIB,
                rates[-1] / churn,
            ]
        )
        start_ns = age_ns
    return rates


def _fill(copy: CopyEngine, trace: DatabaseTrace) -> None:
    """The volume as it is at the beginning; no history of that."""
    blocks = list(trace.fill().items())
    step = 8 * MIB // BLOCK_BYTES
    for at in range(0, len(blocks), step):
        copy.receive(dict(blocks[at : at + step]), 1 / EPOCHS_PER_SECOND)
        _apply(copy)
    copy.engine.undo.drop_all()


def _apply(copy: CopyEngine, *, with_undo: bool = True) -> int:
    """Apply all that is durable; data written to the image."""
    written = 0
    while (job := copy.next_pass()) is not None:
        job.with_undo = with_undo
        job.run()
        written += job.bytes_written
        copy.applied(job)
    return written


async def _throughput(options: Options) -> Result:
    result = Result(NAME, "Applying with history and without, the same blocks in turns")
    rounds = options.choose_rounds(7, 2)
    size, amount = options.choose(2 * GIB, 64 * MIB), options.choose(256 * MIB, 8 * MIB)
    require_free(options.directory, 2 * size + 4 * GIB)
    result.settings = {"rounds": rounds, "volume_bytes": size, "slot_bytes": amount}
    limits = replace(PRODUCTION, undo_bytes_max=GIB)
    await asyncio.to_thread(_play_turns, options, limits, size, amount, rounds, result)
    return result


def _play_turns(
    options: Options, limits: Limits, size: int, amount: int, rounds: int, result: Result
) -> None:
    directory = options.directory / "copy"
    copy = CopyEngine(directory, size, 2 * GIB, limits, is_durable=True)
    trace = DatabaseTrace(size, seed=2)
    _fill(copy, trace)
    chance = random.Random(3)
    noise = chance.randbytes(4 * MIB)
    for number in range(rounds):
        speeds: dict[str, float] = {}
        turns = ["with", "without"][:: 1 if number % 2 else -1]
        for turn in turns:
            _receive_scattered(copy, chance, noise, amount)
            sync_file_system(options.directory)
            began = time.perf_counter()
            written = _apply(copy, with_undo=turn == "with")
            speeds[turn] = written / (time.perf_counter() - began)
            if turn == "without":
                # What is kept does not lead to the image any more.
                copy.engine.undo.drop_all()
        result.rounds.append({"round": number, **speeds})
    copy.close()
    shutil.rmtree(directory)
    ratios = [each["with"] / each["without"] for each in result.rounds]
    result.at_least("apply throughput, with history / without", ratios, RATIO_MIN)
    for turn in ("with", "without"):
        values = [each[turn] / 1e6 for each in result.rounds]
        result.median(f"scattered 4 KiB blocks applied, {turn} history", values, "MB/s")


def _receive_scattered(copy: CopyEngine, chance: random.Random, noise: bytes, amount: int) -> None:
    """Epochs of 4 MiB of random blocks, durable, not applied."""
    blocks_all = copy.engine.images[0].size_bytes // BLOCK_BYTES
    per_epoch = 4 * MIB // BLOCK_BYTES
    for _ in range(amount // (4 * MIB)):
        chosen = sorted(chance.sample(range(blocks_all), per_epoch))
        starts = [chance.randrange(len(noise) - 2 * KIB) for _ in chosen]
        text = b"scattered block ".ljust(16) * (BLOCK_BYTES // 32)
        contents = [noise[at : at + 2 * KIB] + text for at in starts]
        copy.receive(dict(zip(chosen, contents, strict=True)), 1 / EPOCHS_PER_SECOND)


CELLS = [
    Cell(NAME, _levels, "levels"),
    Cell(NAME, _throughput, "apply"),
    *full_history.CELLS,
    Cell(NAME, rewind, "rewind"),
]
