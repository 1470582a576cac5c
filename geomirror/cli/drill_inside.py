"""Runs the check of a drill, with the volume mounted if that is possible, and tears all of it down.

```
 geomirror drill ──▶ unshare ──▶ this, process 1 of namespaces of its own (mounts, processes)
                                   ├ nbdfuse          GEOMIRROR_FILE, the volume as a file
                                   └ in a second mount namespace, this and what follows:
                                      ├ mount -o loop GEOMIRROR_MOUNT
                                      └ sh -c CHECK
```
Every process gets SIGKILL when the one before it is gone, and the kernel takes away a namespace's
processes with its first one, its mounts with its last one, and a mount's loop device with the
mount. So nothing stays, whoever is killed. Without namespaces (not root) nothing is mounted.

Why two: a process that ends leaves its mount namespace before its files are closed. Was nbdfuse the
last one in that of the file system, it would unmount what only it can write, and hang for ever.
Process 1 is the last one in the second namespace, and nbdfuse is gone by then: the kernel's
writes fail, and the unmount goes on.

Says what it does in lines of JSON on a descriptor: `{"mount": …}`, then `{"check": …}`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geomirror.errors import GeomirrorError
from geomirror.node.attach_plan import file_system_of, probe_command
from geomirror.node.attach_tools import mounts_here
from geomirror.node.process_identity import death_signal

PLACE = Path("/run/geomirror-drill")
"""Two empty directories, to mount on; what is mounted there is seen in the namespace only."""
TOOL_S_MAX = 60.0
"""nbdfuse's start, a probe, an unmount."""
MOUNT_S_MAX = 180.0
"""A file system's journal is replayed."""
RELEASE_S_MAX = 10.0
SAFE_OPTIONS = {
    "ext2": "errors=remount-ro",
    "ext3": "errors=remount-ro",
    "ext4": "errors=remount-ro",
    "xfs": "nouuid",
}
"""ext may be set to panic at an error, and a drill's disk may go away; XFS wants to be the only one
of its UUID."""
CLONE_NEWNS = 0x20000
"""From linux/sched.h."""
_POLL_S = 0.02


class Disk:
    """A volume as a file, and its file system as a mount."""

    def __init__(self, uri: str, volume: str, *, mounts: bool) -> None:
        self._uri = uri
        self._volume = volume
        self._mounts = mounts
        self._fuse_path, self._path = PLACE / "fuse", PLACE / "mount"
        self._helper: subprocess.Popen[bytes] | None = None
        self._loop = Path()
        self.helper_pid = 0
        self.file: Path | None = None
        self.mount: Path | None = None
        self.kind: str | None = None
        self.reason = ""

    def make(self) -> None:
        """As far as it goes; `reason` says why not further."""
        try:
            self._make()
        except (GeomirrorError, OSError) as error:
            self.reason = error.message if isinstance(error, GeomirrorError) else str(error)
        except subprocess.CalledProcessError as error:
            said = " ".join(error.stderr.decode(errors="replace").split())
            self.reason = f"{error.cmd[0]}: {said or f'exit code {error.returncode}'}"
        except subprocess.TimeoutExpired as error:
            self.reason = f"{error.cmd[0]} took longer than {error.timeout:g} s"

    def _make(self) -> None:
        for path, mode in ((PLACE, 0o755), (self._fuse_path, 0o700), (self._path, 0o755)):
            path.mkdir(mode=mode, exist_ok=True)
        self._helper = subprocess.Popen(
            ["nbdfuse", str(self._fuse_path), self._uri],
            stdin=subprocess.DEVNULL,
            # What it says is not the check's.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=death_signal(),
        )
        self.helper_pid = self._helper.pid
        file, give_up = self._fuse_path / "nbd", time.monotonic() + TOOL_S_MAX
        while not file.exists():
            if self._helper.poll() is not None or time.monotonic() > give_up:
                self.reason = "nbdfuse did not show the volume"
                return
            time.sleep(_POLL_S)
        leave_mount_namespace()
        self.file = file
        if not self._mounts:
            self.reason = "--no-mount"
            return
        probed = subprocess.run(
            probe_command(str(file)), capture_output=True, timeout=TOOL_S_MAX, check=False
        )
        kind = file_system_of(probed.stdout.decode(errors="replace"), self._volume)
        if kind == "btrfs":
            # It takes two disks of one UUID for one file system, and mixes them up.
            self.reason = "btrfs is not mounted beside another copy of itself"
            return
        options = ",".join(filter(None, ("loop,nodev,nosuid", SAFE_OPTIONS.get(kind))))
        run("mount", "-t", kind, "-o", options, "--", str(file), str(self._path))
        self.mount, self.kind = self._path, kind
        found = [each for each in mounts_here() if each.path == str(self._path)]
        self._loop = Path("/sys/block", Path(found[-1].source).name, "loop/backing_file")

    def unmake(self) -> None:
        """In order, if that goes quickly; what does not is left to the kernel."""
        if self.mount is not None and os.path.ismount(self.mount):
            _repeat("umount", str(self.mount))
            # It goes a little later than its mount.
            give_up = time.monotonic() + RELEASE_S_MAX
            while self._loop.exists() and time.monotonic() < give_up:
                time.sleep(_POLL_S)
        if self._helper is not None:
            self._helper.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._helper.wait(RELEASE_S_MAX)


def leave_mount_namespace() -> None:
    """For a copy of it, in which alone is mounted what is mounted from now on."""
    system = ctypes.CDLL(None, use_errno=True)
    if system.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "a second mount namespace cannot be made")


def run(*command: str) -> None:
    """Run a tool. :raises subprocess.SubprocessError: it failed."""
    subprocess.run(command, capture_output=True, timeout=MOUNT_S_MAX, check=True)


def _repeat(*command: str) -> None:
    """Until it works: what used it is being ended."""
    give_up = time.monotonic() + RELEASE_S_MAX
    while time.monotonic() < give_up:
        try:
            run(*command)
            return
        except subprocess.CalledProcessError:
            time.sleep(5 * _POLL_S)
        except (OSError, subprocess.TimeoutExpired):
            return


def run_check(
    command: str, environment: Mapping[str, str], timeout_s: float, spared: int | None
) -> dict[str, Any]:
    """Run it, and end whatever it leaves running.

    :param spared: in a namespace of our own: the process that must stay; None elsewhere.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        env=dict(environment),
        start_new_session=True,
        preexec_fn=death_signal(),
    )
    is_late = False
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        is_late = True
        _end(process, spared, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
    _end(process, spared, signal.SIGKILL)
    code = process.wait()
    seconds = round(time.monotonic() - began, 3)
    return {"exit_code": code, "is_late": is_late, "seconds": seconds}


def _end(process: subprocess.Popen[bytes], spared: int | None, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    if spared is None:
        return
    # /proc is this namespace's own, so these are the check's, whatever sessions they made.
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (os.getpid(), spared):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(name), number)


def main() -> int:
    """Run the plan that comes as the only argument."""
    plan = json.loads(sys.argv[1])
    report: int = plan["report"]
    os.set_inheritable(report, False)
    is_private: bool = plan["is_private"]
    assert not is_private or os.getpid() == 1
    disk = Disk(plan["uri"], plan["volume"], mounts=plan["mounts"])
    if is_private:
        # Copies of mounts that others may want to unmount meanwhile.
        for path in plan["others"]:
            subprocess.run(["umount", "--lazy", "--", path], capture_output=True, check=False)
        disk.make()
    else:
        disk.reason = plan["reason"]
    said = {"file_system": disk.kind, "reason": disk.reason}
    os.write(report, json.dumps({"mount": said}).encode() + b"\n")
    paths = {"GEOMIRROR_FILE": disk.file, "GEOMIRROR_MOUNT": disk.mount}
    environment = {
        **{key: text for key, text in os.environ.items() if key not in paths},
        **plan["environment"],
        **{key: str(path) for key, path in paths.items() if path is not None},
    }
    try:
        spared = disk.helper_pid if is_private else None
        found = run_check(plan["check"], environment, plan["timeout_s"], spared)
        os.write(report, json.dumps({"check": found}).encode() + b"\n")
    finally:
        disk.unmake()
    return 0


if __name__ == "__main__":
    sys.exit(main())
