"""The client of all comparisons: fio with its NBD engine, one connection a job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from geomirror.errors import GeomirrorError
from geomirror.lab.process_io import run

_PERCENTILES = {"p50_us": "50.000000", "p99_us": "99.000000", "p999_us": "99.900000"}


@dataclass(frozen=True)
class Load:
    """What a client does for a while. It ends at `seconds` or `io_bytes`, whichever is first."""

    pattern: str
    """fio's `--rw`."""
    block_bytes: int
    depth: int
    seconds: float
    area_bytes: int
    """Part of the volume that is used."""
    io_bytes: int = 0
    """Bytes of each job; 0 is no bound."""
    jobs: int = 1
    has_flush_each: bool = False
    """A FLUSH after every write (`--fsync=1`; `--sync=1` does nothing with this engine)."""
    is_incompressible: bool = False
    """New random bytes for every write; else fio's default, of which zstd saves a quarter."""
    bytes_per_second: int = 0
    seed: int = 1
    """Equal seeds give equal offsets."""

    def arguments(self, uri: str) -> list[str]:
        """fio's command line."""
        found = [
            *("fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"),
            *(f"--rw={self.pattern}", f"--bs={self.block_bytes}", f"--iodepth={self.depth}"),
            *(f"--size={self.area_bytes}", f"--numjobs={self.jobs}", "--group_reporting"),
            *("--norandommap", f"--randseed={self.seed}"),
            "--percentile_list=50:99:99.9",
        ]
        if self.seconds:
            found.append(f"--runtime={max(1, round(self.seconds * 1000))}ms")
        # Without a bound in bytes fio would end with the first pass over the area.
        found.append(f"--io_size={self.io_bytes}" if self.io_bytes else "--time_based")
        if self.has_flush_each:
            found.append("--fsync=1")
        if self.is_incompressible:
            found.append("--refill_buffers=1")
        if self.bytes_per_second:
            found.append(f"--rate={self.bytes_per_second // self.jobs}")
        return found


@dataclass(frozen=True)
class Outcome:
    """What fio saw; latencies are from submission to reply."""

    iops: float
    bytes_per_second: float
    requests: int
    seconds: float
    p50_us: float
    p99_us: float
    p999_us: float
    flush_p50_us: float = 0.0
    flush_p99_us: float = 0.0
    flush_p999_us: float = 0.0


async def run_fio(load: Load, uri: str, *, timeout_s: float = 900.0) -> Outcome:
    """Run a load against an export.

    :raises GeomirrorError: fio failed; the message is what it printed.
    """
    output = await run(load.arguments(uri), timeout_s=timeout_s)
    text = output.stdout.decode(errors="replace")
    if output.returncode != 0 or "{" not in text:
        printed = (output.stderr.decode(errors="replace") + text).strip()
        raise GeomirrorError(f"fio failed with exit code {output.returncode}: {printed[-500:]}")
    # The engine prints a line before the document.
    job = json.loads(text[text.index("{") :])["jobs"][0]
    return _outcome(job, "read" if "read" in load.pattern else "write", load)


def _outcome(job: dict[str, Any], direction: str, load: Load) -> Outcome:
    found = job[direction]
    flushes = job["sync"]["lat_ns"]
    percentiles = {
        name: found["clat_ns"].get("percentile", {}).get(key, 0) / 1000
        for name, key in _PERCENTILES.items()
    }
    flush: dict[str, float] = {}
    if load.has_flush_each:
        for name, key in _PERCENTILES.items():
            flush[f"flush_{name}"] = flushes["percentile"][key] / 1000
    return Outcome(
        iops=found["iops"],
        bytes_per_second=found["bw_bytes"],
        requests=found["total_ios"],
        seconds=found["runtime"] / 1000,
        **percentiles,
        **flush,
    )
