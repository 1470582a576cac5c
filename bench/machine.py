"""What the machine is, and what a process has cost so far."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

LIBRARIES = ("aiohttp", "cryptography", "msgspec", "numpy", "uvloop", "xxhash", "zstandard")
TOOLS = ("fio", "nbdkit", "qemu-nbd", "qemu-storage-daemon", "nbdcopy", "rsync", "pgbench")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, user and system; 10 ms resolution."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def memory_bytes(pid: int, key: str = "VmRSS") -> int:
    """Resident memory of a process now, or with `VmHWM` the most it ever was."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no {key}")


def sync_file_system(directory: Path) -> None:
    """Write out what earlier slots left behind, so that no slot pays for another one."""
    subprocess.run(["sync", "-f", str(directory)], check=True)


def describe(directory: Path) -> dict[str, object]:
    """The machine, for the report."""
    model = memory = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        model = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    with contextlib.suppress(OSError):
        memory = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()[0].split()[1]
    return {
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory or 0) * 1024,
        "kernel": platform.release(),
        "file_system": _first_line("stat", "-f", "-c", "%T", str(directory)),
    }


def versions() -> Mapping[str, str]:
    """Of everything that takes part."""
    found = {"python": platform.python_version(), "geomirror": metadata.version("geomirror")}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    for tool in TOOLS:
        found[tool] = _first_line(tool, "--version") or "not installed"
    return found


def missing_tools(*names: str) -> list[str]:
    """Those of the programs that are not installed."""
    return [name for name in names if shutil.which(name) is None]


def python_command(*arguments: str) -> list[str]:
    """A command for this very interpreter."""
    return [sys.executable, *arguments]


def _first_line(*command: str) -> str:
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return output.stdout.partition("\n")[0].strip()
