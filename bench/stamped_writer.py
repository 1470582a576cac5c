"""`python -m bench.stamped_writer`: performs a plan's writes at a steady rate and keeps a log.

A process of its own, so that whoever watches the copy does not slow the writer. The log is mapped
and shared: it can be read meanwhile, and what was written stays known if the writer is killed.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rich_click as click

from bench.stamps import REGION_BYTES, Plan, content
from geomirror.environment import SECOND
from geomirror.nbd.client_io import NbdClient

FLUSH_EVERY = 16
"""Writes between two flushes."""
ISSUED, DONE, FLUSHED = range(3)
"""Columns: times of the monotonic clock in ns, 0 while it has not happened; row = write number."""
Log = npt.NDArray[np.int64]


def open_log(path: Path, count: int, *, is_new: bool = False) -> Log:
    """The log of `count` writes."""
    return np.memmap(path, dtype=np.int64, mode="w+" if is_new else "r+", shape=(count + 1, 3))


async def perform(plan: Plan, uri: str, log: Log, rate: float, seconds: float) -> None:
    """Write, one after another; a write that is late is made up for until time is over."""
    random = os.urandom(2 * REGION_BYTES)
    began = time.monotonic_ns()
    async with await NbdClient.connect(uri) as client:
        for number in range(1, plan.count + 1):
            due = began + int((number - 1) / rate * SECOND)
            now = time.monotonic_ns()
            if now >= began + int(seconds * SECOND):
                break
            if due > now:
                await asyncio.sleep((due - now) / SECOND)
            offset, blocks = plan.write(number)
            # Another place in the random bytes each time: nothing finds them again.
            start = number * 977 % REGION_BYTES
            data = content(number, blocks, random[start : start + REGION_BYTES])
            log[number, ISSUED] = time.monotonic_ns()
            await client.write(offset, data)
            log[number, DONE] = time.monotonic_ns()
            if number % FLUSH_EVERY == 0:
                await client.flush()
                log[number, FLUSHED] = time.monotonic_ns()
        await client.flush()


@click.command()
@click.option("--uri", required=True, help="Export to write to.")
@click.option("--log", "path", required=True, type=click.Path(path_type=Path), help="An open log.")
@click.option("--volume-bytes", required=True, type=int, help="Of the plan.")
@click.option("--regions", required=True, type=int, help="Of the plan.")
@click.option("--count", required=True, type=int, help="Of the plan.")
@click.option("--seed", required=True, type=int, help="Of the plan.")
@click.option("--rate", required=True, type=float, help="Writes per second.")
@click.option("--seconds", required=True, type=float, help="End after so long.")
def main(
    uri: str,
    path: Path,
    volume_bytes: int,
    regions: int,
    count: int,
    seed: int,
    rate: float,
    seconds: float,
) -> None:
    """Perform a plan."""
    plan = Plan(volume_bytes, regions, count, seed)
    asyncio.run(perform(plan, uri, open_log(path, count), rate, seconds))


if __name__ == "__main__":
    main()
