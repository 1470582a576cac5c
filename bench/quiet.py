"""Whether other work disturbed a measurement: what everybody else's processes cost meanwhile.

Before a cell the whole machine is looked at, while we do nothing. During it, what counts is the CPU
time of processes that are neither ours nor the kernel's (writing back for us is the kernel's work),
and the time that a hypervisor took away.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BEFORE_MAX = 0.15
"""Of all CPUs, over some seconds without any work of ours."""
OTHERS_MAX = 0.10
"""Of all CPUs, during the cell: other processes and stolen time."""
LOOK_S = 2.0
INIT = 1
KERNEL_THREADS = 2
"""Pid of their parent."""
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """Of one moment."""

    parent: int
    ticks: int
    """CPU time of it and its reaped children."""


ProcessKey = tuple[int, str]
"""Pid and start time."""


def _processes() -> dict[ProcessKey, Process]:
    """CPU ticks of each process and its reaped children."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text(encoding="ascii", errors="replace")
            except OSError:
                continue  # it ended meanwhile
            fields = text.rpartition(")")[2].split()
            ticks = sum(int(value) for value in fields[11:15])
            found[int(entry), fields[19]] = Process(int(fields[1]), ticks)
    return found


def _machine() -> dict[str, int]:
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()[1:]
    return dict(zip(names, map(int, first), strict=False))


def busy_part(seconds: float = LOOK_S) -> float:
    """Part of all CPUs that is in use over the next seconds."""
    before = _machine()
    time.sleep(seconds)
    spent = {name: value - before[name] for name, value in _machine().items()}
    idle = spent["idle"] + spent.get("iowait", 0)
    return 1.0 - idle / max(1, sum(spent.values()))


def await_quiet(timeout_s: float) -> float:
    """Wait until the machine is quiet, or for so long; the part of its CPUs in use last seen."""
    give_up = time.monotonic() + timeout_s
    while (busy := busy_part()) > BEFORE_MAX and time.monotonic() < give_up:
        time.sleep(LOOK_S)
    return busy


def others_ticks(
    before: Mapping[ProcessKey, Process], after: Mapping[ProcessKey, Process], own_pid: int
) -> int:
    """What processes spent between two moments that are neither the kernel's nor descend from us.

    One that came and went between them counts with the parent that reaped it; not with init, which
    also reaps daemons of ours, such as a database.
    """
    parents = {pid: process.parent for (pid, _), process in after.items()}
    parents_before = {pid: process.parent for (pid, _), process in before.items()}

    def is_counted(pid: int) -> bool:
        while pid not in (0, INIT, KERNEL_THREADS, own_pid):
            pid = parents.get(pid, 0)
        return pid not in (KERNEL_THREADS, own_pid)

    def reaper(pid: int) -> int:
        """Who got the time of a process that ended: the first one above it that is still there."""
        while pid > INIT and pid not in parents:
            pid = parents_before.get(pid, 0)
        return pid

    total = 0
    for key, process in after.items():
        if key[0] not in (INIT, KERNEL_THREADS) and is_counted(key[0]):
            total += process.ticks - (before[key].ticks if key in before else 0)
    for key, process in before.items():
        # What it had spent before came to its reaper meanwhile, and is of no concern.
        if key not in after and (found := reaper(process.parent)) > INIT and is_counted(found):
            total -= process.ticks
    return max(0, total)


@dataclass
class Disturbance:
    """From its making until `end`."""

    busy_before: float
    load_average_before: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))
    others_part: float = 0.0
    """Of all CPUs: processes of others."""
    stolen_part: float = 0.0

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._processes = _processes()
        self._stolen = _machine().get("steal", 0)

    def end(self) -> None:
        """Take stock. Our own processes have to be gone, or children of this one."""
        elapsed = (time.monotonic() - self._began) * _TICKS_PER_SECOND * (os.cpu_count() or 1)
        now = _processes()
        ticks = others_ticks(self._processes, now, os.getpid())
        self.others_part = round(ticks / max(1.0, elapsed), 4)
        self.stolen_part = round((_machine().get("steal", 0) - self._stolen) / max(1, elapsed), 4)

    @property
    def is_quiet(self) -> bool:
        """Whether figures of this time mean something."""
        return self.busy_before <= BEFORE_MAX and self.others_part + self.stolen_part <= OTHERS_MAX

    def to_json(self) -> dict[str, Any]:
        """For the result's `machine`."""
        return {**asdict(self), "is_quiet": self.is_quiet}
