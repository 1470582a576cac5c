"""geomirror beside other ways to keep a copy at another site, over the same emulated packets.

A paced stream of writes on a volume, an outage of the link, and a copy that is looked at ten times
a second. All take turns in one run; the order rotates. What is compared:

- held: seconds from a write's completion until the copy has it: median and p95 of the writes before
  the outage, worst of all;
- usable: how often the copy was a state that the disk had at some moment;
- bytes that crossed the link, both directions with all headers, per byte written;
- what the writer felt, against a disk without any mirror;
- the outage: time and bytes from its end until all that was written before that is held.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.cells import Cell
from bench.machine import missing_tools, sync_file_system
from bench.mirror_geomirror import GeomirrorMirror
from bench.mirror_qemu import QemuMirror, QemuSynchronousMirror
from bench.mirrors import Mirror, NbdcopyMirror, NoMirror, RsyncMirror, checked
from bench.observe import Observed, Times, observe
from bench.options import Options
from bench.report import Result
from bench.rig import require_free
from bench.stamps import REGION_BYTES, Numbers, Plan, background
from geomirror.environment import SECOND
from geomirror.lab.packet_emulator_io import PacketEmulator, may_run
from geomirror.limits import MIB

NAME = "peers"
MIRRORS: Sequence[type[Mirror]] = (
    NoMirror,
    GeomirrorMirror,
    RsyncMirror,
    NbdcopyMirror,
    QemuMirror,
    QemuSynchronousMirror,
)
LINK = "rtt=80ms,rate=100mbit"
OPEN = "rtt=0ms,rate=unlimited,loss=0%"
RATE = 100.0
"""Writes a second; 10 KiB each on average, 8 Mbit/s, of which five eighths do not compress away."""
RATIO_MIN = 0.02
COLUMNS = [
    *("link", "mirror", "held p50 s", "p95 s", "worst s", "usable %", "in cut %", "after %"),
    *("wire ×", "write p50 µs", "p99 µs", "worst ms", "resume s", "MiB", "equal"),
]


@dataclass(frozen=True)
class Scenario:
    """A link, and the congestion control that a site has set for everybody."""

    loss: str
    congestion: str


SCENARIOS = {
    "loss_0.1": Scenario("0.1%", "bbr"),
    "loss_1": Scenario("1%", "bbr"),
    # What most sites have (CUBIC) behaves like this one here, and not every kernel lets a network
    # namespace choose it. geomirror asks for BBR by itself.
    "loss_1_reno": Scenario("1%", "reno"),
}


@dataclass(frozen=True)
class Row:
    """The numbers of one mirror in one round."""

    held_p50_s: float
    held_p95_s: float
    held_worst_s: float
    usable: float
    usable_in_cut: float
    usable_after: float
    wire_ratio: float
    write_p50_us: float
    write_p99_us: float
    write_worst_ms: float
    resume_s: float
    resume_mib: float
    is_identical: float

    @classmethod
    def of(cls, seen: Observed, *, has_copy: bool) -> Row:
        """Reduce an observation; what there is no copy for is not a number."""
        nothing = math.nan
        steady, later = (seen.latencies_us(is_steady=value) for value in (True, False))
        delays = seen.delays_s(is_steady=True) if has_copy else [nothing]
        all_delays = seen.delays_s(is_steady=False) if has_copy else []
        resumed = seen.resumed_ns or seen.end_ns
        crossed = seen.wire_bytes.get("resumed", seen.wire_bytes["end"]) - seen.wire_bytes["up"]
        logical = max(1, seen.plan.bytes_through(seen.writes))
        return cls(
            held_p50_s=_percentile(delays, 50),
            held_p95_s=_percentile(delays, 95),
            held_worst_s=max(all_delays, default=nothing),
            usable=seen.usable(0, seen.down_ns) if has_copy else nothing,
            usable_in_cut=seen.usable(seen.down_ns, seen.up_ns) if has_copy else nothing,
            usable_after=seen.usable(seen.up_ns, seen.end_ns) if has_copy else nothing,
            wire_ratio=seen.wire_bytes["end"] / logical if has_copy else nothing,
            write_p50_us=_percentile(steady, 50),
            write_p99_us=_percentile(steady, 99),
            write_worst_ms=float(max([*steady, *later], default=nothing)) / 1000,
            resume_s=(resumed - seen.up_ns) / SECOND if has_copy else nothing,
            resume_mib=crossed / MIB if has_copy else nothing,
            is_identical=float(seen.is_identical) if has_copy else nothing,
        )


def _percentile(values: Sequence[float] | Numbers, percent: float) -> float:
    # A writer that waits for the link may not even come to its first flush.
    return float(np.percentile(values, percent)) if len(values) else math.nan


async def _run(options: Options, scenario: str) -> Result:
    result = Result(NAME, f"Mirrors beside each other, {scenario}: {LINK}, {_words(scenario)}")
    tools = ("nbdkit", "nbdcopy", "rsync", "qemu-storage-daemon", "ip", "cc")
    if missing := missing_tools(*tools):
        result.skipped_because = f"not installed: {', '.join(missing)}"
        return result
    if not may_run():
        result.skipped_because = "a packet-level network needs root and /dev/net/tun"
        return result
    times = Times(20, 10, 15, 45) if not options.is_short else Times(3, 2, 3, 5)
    rounds = options.choose_rounds(3, 1)
    size, regions = options.choose(256 * MIB, 32 * MIB), options.choose(32, 8)
    require_free(options.directory, 8 * size + (2 << 30))
    result.settings = {
        "rounds": rounds,
        "volume_bytes": size,
        "written_to_bytes": regions * REGION_BYTES,
        "writes_per_second": RATE,
        "seconds_before_in_after_outage": f"{times.steady:g}/{times.cut:g}/{times.after:g}",
    }
    rows: dict[str, list[Row]] = {kind.name: [] for kind in MIRRORS}
    for number in range(rounds):
        plan = Plan(size, regions, int(times.writing * RATE), seed=number + 1)
        at = number % len(MIRRORS)
        for kind in (*MIRRORS[at:], *MIRRORS[:at]):
            row, more = await _turn(kind, options.directory, plan, times, SCENARIOS[scenario])
            rows[kind.name].append(row)
            if kind is GeomirrorMirror and more["restarts"]:
                result.invalid_because.append(f"{more['restarts']} resyncs")
            found = {key: _number(value) for key, value in vars(row).items()}
            result.rounds.append({"round": number, "mirror": kind.name, **found, **more})
    _conclude(result, scenario, rows)
    return result


def _words(scenario: str) -> str:
    found = SCENARIOS[scenario]
    return f"loss {found.loss}, {found.congestion}"


async def _turn(
    kind: type[Mirror], directory: Path, plan: Plan, times: Times, scenario: Scenario
) -> tuple[Row, dict[str, Any]]:
    """One mirror in a network of its own."""
    place = directory / "turn"
    place.mkdir()
    image = place / "image"
    _make_image(image, plan)
    async with PacketEmulator(["a", "b"], {("a", "b"): OPEN}, seed=plan.seed) as wan:
        for node in ("a", "b"):
            setting = f"net.ipv4.tcp_congestion_control={scenario.congestion}"
            await checked(*wan.node(node).command("sysctl", "-qw", setting))
        mirror = kind(place / "mirror", wan, plan)
        try:
            await mirror.prepare(image)
            sync_file_system(directory)
            await wan.link("a", "b").set(f"{LINK},loss={scenario.loss}")
            seen = await observe(mirror, wan, times, RATE, place / "log")
        finally:
            await mirror.close()
    more = {
        "passes": mirror.passes,
        "restarts": mirror.restarts,
        "writes": seen.writes,
        "blocks_that_never_arrived": seen.lost_writes() if mirror.has_copy else None,
        "wire_bytes": seen.wire_bytes,
        "flush_p50_us": _number(_percentile(seen.flush_latencies_us(), 50)),
    }
    row = Row.of(seen, has_copy=mirror.has_copy)
    shutil.rmtree(place)
    return row, more


def _make_image(path: Path, plan: Plan) -> None:
    with path.open("xb") as file:
        file.truncate(plan.volume_bytes)
        for offset, data in background(plan.volume_bytes, plan, os.urandom(REGION_BYTES)):
            file.seek(offset)
            file.write(data)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _conclude(result: Result, scenario: str, rows: dict[str, list[Row]]) -> None:
    result.columns = COLUMNS
    for name, found in rows.items():
        medians = [statistics.median(getattr(row, key) for row in found) for key in vars(found[0])]
        cells: list[str | float] = ["" if math.isnan(value) else value for value in medians]
        for at in (3, 4, 5):
            value = cells[at]
            cells[at] = value if isinstance(value, str) else value * 100
        if name != NoMirror.name:
            cells[-1] = "yes" if all(row.is_identical for row in found) else "no"
        result.rows.append([scenario, name, *cells])
    ours = rows[GeomirrorMirror.name]
    usable = [min(row.usable, row.usable_in_cut, row.usable_after) for row in ours]
    result.at_least(f"{scenario}: geomirror's copy usable, part of looks", usable, 1, "")
    for name, theirs in rows.items():
        pairs = list(zip(ours, theirs, strict=True))
        if name == NoMirror.name:
            for key in ("write_p50_us", "write_p99_us"):
                ratios = [getattr(us, key) / getattr(them, key) for us, them in pairs]
                label = key.removesuffix("_us").replace("_", " ")
                result.median(f"{scenario}: {label}, geomirror / no mirror", ratios, "x")
        elif name != GeomirrorMirror.name:
            for key, label in (
                ("held_p50_s", "time until held"),
                ("wire_ratio", "bytes on the link"),
                ("resume_s", "time to resume"),
                ("resume_mib", "bytes to resume"),
                ("write_p99_us", "write p99"),
            ):
                if not all(getattr(them, key) >= RATIO_MIN for them in theirs):
                    continue  # it sent nothing, or had nothing to wait for: no ratio
                if key.startswith(("wire", "resume_mib")) and not all(
                    them.is_identical for them in theirs
                ):
                    continue  # what it sent was not enough
                ratios = [getattr(us, key) / getattr(them, key) for us, them in pairs]
                result.median(f"{scenario}: {label}, geomirror / {name}", ratios, "x")


CELLS = [Cell(NAME, functools.partial(_run, scenario=name), name) for name in SCENARIOS]
