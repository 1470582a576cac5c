"""What single operations cost that decisions in the code rest on: no daemon, one thread.

A comment that says `bench costs` beside a number has it from here.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import random
import sqlite3
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import xxhash
import zstandard

from bench.options import Options
from bench.report import Result
from geomirror.limits import BLOCK_BYTES, FRAME_RAW_BYTES_MAX, KIB, MIB
from geomirror.node.run_io import SWITCH_S
from geomirror.volume.arrays import joined
from geomirror.volume.digest import digests_of
from geomirror.wan_protocol.sender import LEVEL, LEVEL_BEHIND

NAME = "costs"
SEGMENT_BYTES = 64 * MIB
"""`segment_bytes` of production."""


async def run(options: Options) -> Result:
    """Each operation so often that the clock's own cost does not matter; medians of rounds."""
    result = Result(NAME, "Single operations that decisions rest on")
    rounds, times = options.choose_rounds(5, 2), options.choose(10_000, 100)
    result.settings = {"rounds": rounds, "times": times}
    block = os.urandom(BLOCK_BYTES)
    cpu: dict[str, Callable[[], object]] = {
        "digest of 4 KiB: XXH3-128": lambda: xxhash.xxh3_128_digest(block),
        "digest of 4 KiB: CRC-32 (zlib)": lambda: zlib.crc32(block),
        "digest of 4 KiB: SHA-256": lambda: hashlib.sha256(block).digest(),
        "digest of 4 KiB: BLAKE2b": lambda: hashlib.blake2b(block, digest_size=16).digest(),
        "64 digests in halves": lambda: digests_of([block] * 64),
        "copying 4 KiB": lambda: bytearray(block),
    }
    tables = [np.zeros(3, dtype=[("block", "<u8"), ("count", "<u4")]) for _ in range(3)]
    cpu["joining 3 tables of 3 rows: numpy.concatenate"] = lambda: np.concatenate(tables)
    cpu["joining 3 tables of 3 rows: arrays.joined"] = lambda: joined(tables, tables[0].dtype)
    for name, work in cpu.items():
        result.median(name, [_microseconds(work, times) for _ in range(rounds)], "us")
    _compression(result, rounds)
    _interpreter(result, rounds, options.choose(200, 20))
    await _handing_over(result, rounds, times)
    await asyncio.to_thread(_files, options.directory, result, rounds, times)
    return result


def _microseconds(work: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) * 1e6 / times


def _compression(result: Result, rounds: int) -> None:
    """What the two levels of shipping do with frames of a database's pages."""
    rows = random.Random(1)
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b INTEGER, c TEXT, d REAL)")
        database.executemany(
            "INSERT INTO t (b, c, d) VALUES (?, ?, ?)",
            (
                (rows.randrange(10**6), f"row {rows.randrange(10**9)}", rows.random())
                for _ in range(40_000)
            ),
        )
        database.commit()
        pages = database.serialize()
    frames = [
        pages[at : at + FRAME_RAW_BYTES_MAX] for at in range(0, len(pages), FRAME_RAW_BYTES_MAX)
    ]
    for level in (LEVEL, LEVEL_BEHIND):
        work = functools.partial(_compressed_bytes, level, frames)
        part = work() / len(pages)
        spent = [_microseconds(work, 1) for _ in range(rounds)]
        name = f"a database's pages, zstd level {level}"
        result.median(name, [len(pages) / MIB / us * 1e6 for us in spent], "MiB/s")
        result.median(f"{name}: part that is left", [part], "x")


def _compressed_bytes(level: int, frames: Sequence[bytes]) -> int:
    compress = zstandard.ZstdCompressor(level=level).compress
    return sum(len(compress(frame)) for frame in frames)


def _interpreter(result: Result, rounds: int, times: int) -> None:
    """How late a thread wakes beside one that computes, by the interpreter's switch interval."""
    default_s = sys.getswitchinterval()
    is_done = threading.Event()

    def compute() -> None:
        while not is_done.is_set():
            sum(range(1000))

    other = threading.Thread(target=compute)
    other.start()
    try:
        for interval_s in (default_s, SWITCH_S):
            sys.setswitchinterval(interval_s)
            late = [_microseconds(lambda: time.sleep(0.001), times) - 1000 for _ in range(rounds)]
            result.median(f"waking beside a computing thread, {interval_s * 1e3:g} ms", late, "us")
    finally:
        sys.setswitchinterval(default_s)
        is_done.set()
        other.join()


async def _handing_over(result: Result, rounds: int, times: int) -> None:
    """A job to a thread and back, by the loop's own means."""
    loop, found = asyncio.get_running_loop(), []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(times // 10):
            await loop.run_in_executor(None, int)
        found.append((time.perf_counter() - began) * 1e6 / (times // 10))
    result.median("a job to an executor and back", found, "us")


def _files(directory: Path, result: Result, rounds: int, times: int) -> None:
    """Blocking."""
    for name, is_zeroed in (("written", True), ("unwritten", False)):
        found = [_sync(directory / name, is_zeroed, times // 20) for _ in range(rounds)]
        result.median(f"write and fdatasync of 4 KiB, {name} blocks", found, "us")
    for name, is_hole in (("a hole", True), ("4 KiB in memory", False)):
        found = [_read(directory / "read", is_hole, times) for _ in range(rounds)]
        result.median(f"reading {name}", found, "us")
    found = [_seek(directory / "read", times) for _ in range(rounds)]
    result.median("finding a stretch of data: two seeks", found, "us")
    zeros = [_zero(directory / "zero") for _ in range(rounds)]
    result.median("zeroing a segment of 64 MiB, without its sync", zeros, "ms")


def _sync(path: Path, is_zeroed: bool, count: int) -> float:
    """Microseconds of a flush at the end of a log whose blocks were (not) written before."""
    with path.open("wb", buffering=0) as file:
        descriptor, block = file.fileno(), b"x" * BLOCK_BYTES
        os.posix_fallocate(descriptor, 0, count * BLOCK_BYTES)
        if is_zeroed:
            os.pwrite(descriptor, bytes(count * BLOCK_BYTES), 0)
        os.fsync(descriptor)
        began = time.perf_counter()
        for at in range(count):
            os.pwrite(descriptor, block, at * BLOCK_BYTES)
            os.fdatasync(descriptor)
        elapsed = time.perf_counter() - began
    path.unlink()
    return elapsed * 1e6 / count


def _read(path: Path, is_hole: bool, times: int) -> float:
    with path.open("wb+", buffering=0) as file:
        descriptor = file.fileno()
        os.ftruncate(descriptor, MIB)
        if not is_hole:
            os.pwrite(descriptor, os.urandom(MIB), 0)
        return _microseconds(lambda: os.pread(descriptor, BLOCK_BYTES, 512 * KIB), times)


def _seek(path: Path, times: int) -> float:
    """Every second block holds data."""
    with closing(path.open("wb+", buffering=0)) as file:
        descriptor = file.fileno()
        os.ftruncate(descriptor, MIB)
        for at in range(0, MIB, 2 * BLOCK_BYTES):
            os.pwrite(descriptor, b"x" * BLOCK_BYTES, at)

        def look() -> None:
            start = os.lseek(descriptor, 512 * KIB, os.SEEK_DATA)
            os.lseek(descriptor, start, os.SEEK_HOLE)

        return _microseconds(look, times)


def _zero(path: Path) -> float:
    """Milliseconds."""
    piece = bytes(MIB)
    with path.open("wb", buffering=0) as file:
        began = time.perf_counter()
        for at in range(0, SEGMENT_BYTES, MIB):
            os.pwrite(file.fileno(), piece, at)
        elapsed = time.perf_counter() - began
    path.unlink()
    return elapsed * 1e3
