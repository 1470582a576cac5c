"""Watches one mirror while somebody writes, through an outage of the link, until it has caught up.

```
 writer   |--------- steady ---------|--- cut ---|------ after ------|
 link     up                         down        up                         … until held, or give up
 copy     looked at ten times a second, each time as if the writer's site were lost now
```
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.machine import python_command
from bench.mirrors import Mirror
from bench.stamped_writer import DONE, FLUSHED, ISSUED, Log, open_log
from bench.stamps import Numbers, Plan
from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError
from geomirror.lab.packet_emulator_io import PacketEmulator
from geomirror.lab.process_io import run

LOOK_S = 0.1
BEGIN_LOOK_S, BEGIN_LOOKS = 0.02, 1500
"""Half a minute: starting the writer takes a second of CPU, more time on a busy machine."""


@dataclass(frozen=True)
class Times:
    """Lengths of the phases, in seconds."""

    steady: float
    cut: float
    after: float
    catch_up_max: float
    """After the writer's end."""

    @property
    def writing(self) -> float:
        """How long the writer writes."""
        return self.steady + self.cut + self.after


@dataclass
class Observed:
    """What a mirror did. Times in ns of the monotonic clock; one row of `looks` each look."""

    plan: Plan
    log: Log
    down_ns: int = 0
    up_ns: int = 0
    end_ns: int = 0
    held_ns: Numbers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """When each entry of the plan was first seen in the copy; 0 for never."""
    looks: list[tuple[int, bool, float]] = field(default_factory=list)
    """Time, whether the copy was usable, age in seconds of the oldest write it did not have."""
    wire_bytes: dict[str, int] = field(default_factory=dict)
    """Both directions, since the beginning: at `down`, `up`, `resumed` and `end`."""
    resumed_ns: int = 0
    """When everything completed before `up` was held; 0 for never."""
    is_identical: bool = False
    passes: int = 0
    restarts: int = 0

    @property
    def writes(self) -> int:
        """How many writes were completed."""
        return int(np.count_nonzero(self.log[:, DONE]))

    def writes_before(self, now_ns: int) -> int:
        """How many writes were completed by then."""
        done = self.log[1:, DONE]
        return int(np.count_nonzero((done > 0) & (done <= now_ns)))

    def latencies_us(self, *, is_steady: bool) -> Numbers:
        """Of the writes that ended before the outage, or of all later ones, in µs.

        One that never ended took until the end.
        """
        issued, done = self.log[1:, ISSUED], self.log[1:, DONE]
        ended = np.where(done == 0, self.end_ns, done)
        chosen = (issued > 0) & ((ended < self.down_ns) == is_steady)
        return np.asarray((ended - issued)[chosen] // 1000, dtype=np.int64)

    def flush_latencies_us(self) -> Numbers:
        """Of all flushes."""
        flushed = self.log[:, FLUSHED] > 0
        found = (self.log[:, FLUSHED] - self.log[:, DONE])[flushed] // 1000
        return np.asarray(found, dtype=np.int64)

    def delays_s(self, *, is_steady: bool) -> list[float]:
        """From the completion of a block's write until the copy had it; before the outage, or all.

        One that never arrived counts with the time until the end: it took longer.
        """
        through = self.writes_before(self.down_ns) if is_steady else self.writes
        end = self.plan.entries_through(through)
        done = self.log[:, DONE][self.plan.entries[0][:end]]
        held = np.where(self.held_ns[:end] == 0, self.end_ns, self.held_ns[:end])
        return [float(value) for value in (held - done) / SECOND]

    def lost_writes(self) -> int:
        """Blocks' writes that never arrived."""
        end = self.plan.entries_through(self.writes)
        return int(np.count_nonzero(self.held_ns[:end] == 0))

    def usable(self, begin_ns: int, end_ns: int) -> float:
        """Part of the looks in a time at which the copy was usable."""
        found = [is_usable for at, is_usable, _ in self.looks if begin_ns <= at < end_ns]
        return sum(found) / len(found) if found else 0.0


async def observe(
    mirror: Mirror, wan: PacketEmulator, times: Times, rate: float, log_path: Path
) -> Observed:
    """Write, cut and watch. The mirror is prepared, the link as it is to be."""
    plan = mirror.plan
    observed = Observed(plan, open_log(log_path, plan.count, is_new=True))
    observed.held_ns = np.zeros(len(plan.entries[0]), dtype=np.int64)
    link = wan.link("a", "b")
    before = await crossed_bytes(wan)

    async def mark(name: str) -> None:
        observed.wire_bytes[name] = await crossed_bytes(wan) - before

    await mirror.begin()
    writing = asyncio.create_task(_write(plan, mirror.uri, log_path, rate, times))
    looking = asyncio.create_task(_look(mirror, observed, mark)) if mirror.has_copy else None
    try:
        await _begun(observed.log, writing)
        await asyncio.sleep(times.steady)
        await link.flap(times.cut)
        observed.down_ns = time.monotonic_ns()
        await mark("down")
        await asyncio.sleep(times.cut)
        observed.up_ns = time.monotonic_ns()
        await mark("up")
        await writing
        observed.end_ns = time.monotonic_ns()
        if looking is not None:
            await asyncio.wait([looking], timeout=times.catch_up_max)
            if looking.done():
                looking.result()
    finally:
        tasks = [writing] if looking is None else [writing, looking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await mark("end")
    observed.end_ns = time.monotonic_ns()
    if mirror.has_copy:
        final = await mirror.scan()
        observed.is_identical = final is not None and bool(
            np.array_equal(final.heads, plan.state(observed.writes)) and plan.is_usable(final)
        )
    return observed


async def _begun(log: Log, writing: asyncio.Task[None]) -> None:
    """Until the writer's process has come to its first write, or is not going to."""
    for _ in range(BEGIN_LOOKS):
        if log[1, ISSUED] or writing.done():
            return
        await asyncio.sleep(BEGIN_LOOK_S)


async def crossed_bytes(wan: PacketEmulator) -> int:
    """IP bytes that both ends have sent into the link, lost ones included."""
    return sum(int(each["bytes_in"]) for each in (await wan.statistics())["links"])


async def _write(plan: Plan, uri: str, log: Path, rate: float, times: Times) -> None:
    options = {
        "uri": uri,
        "log": log,
        "volume-bytes": plan.volume_bytes,
        "regions": plan.regions,
        "count": plan.count,
        "seed": plan.seed,
        "rate": rate,
        "seconds": times.writing,
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    # A write that waits for the link may wait for all of the outage and TCP's next retry.
    output = await run(
        python_command("-m", "bench.stamped_writer", *arguments),
        timeout_s=times.writing + 2 * times.cut + times.catch_up_max + 60,
    )
    if output.returncode != 0:
        said = output.stderr.decode(errors="replace").strip()
        raise GeomirrorError(f"the writer failed: {said[-1000:]}")


async def _look(mirror: Mirror, observed: Observed, mark: Callable[[str], Awaitable[None]]) -> None:
    """Until all that was written is held and the writer has ended."""
    plan, log = observed.plan, observed.log
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        now = time.monotonic_ns()
        completed = observed.writes_before(now)
        stamps = await mirror.scan()
        end = plan.entries_through(completed)
        pending = np.flatnonzero(observed.held_ns[:end] == 0)
        if stamps is not None and len(pending):
            arrived = pending[plan.is_held(stamps, pending)]
            observed.held_ns[arrived] = now
            pending = np.flatnonzero(observed.held_ns[:end] == 0)
        is_usable = stamps is not None and plan.is_usable(stamps)
        oldest = log[:, DONE][plan.entries[0][pending]].min() if len(pending) else now
        observed.looks.append((now, is_usable, float(now - oldest) / SECOND))
        if observed.up_ns and not observed.resumed_ns:
            bound = plan.entries_through(observed.writes_before(observed.up_ns))
            if observed.held_ns[:bound].all():
                observed.resumed_ns = now
                await mark("resumed")
        if observed.end_ns and not len(pending) and is_usable:
            return
        await asyncio.sleep(max(0.0, LOOK_S - (loop.time() - began)))
