"""How a volume becomes a block device of this machine: which tools, which words, in which order.

    fuse: daemon <── relay ──(socket pair)── nbdfuse ── FUSE file ── /dev/loopN ── file system
    nbd:  daemon <── relay ──(Unix socket)── nbd-client ── /dev/nbdN ── file system

Pure decisions over facts that `attach_tools` gathers. The relay, our own process, is what
reconnects and repeats: so neither nbdfuse (which never does) nor the kernel's NBD client sees the
daemon go away, and `nbd-client` gets no -persist and no -timeout, which would end requests that
still wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from geomirror.errors import NotFoundError, RefusedError, UsageError

FUSE, NBD = "fuse", "nbd"
METHODS = (FUSE, NBD)
_PACKAGES = {
    "nbdfuse": "libnbd-bin",
    "nbd-client": "nbd-client",
    "losetup": "mount",
    "mount": "mount",
    "umount": "mount",
    "blkid": "util-linux",
}
"""Debian's package of each tool."""
_TOOLS = {FUSE: ("nbdfuse", "losetup", "umount"), NBD: ("nbd-client",)}
_MOUNT_TOOLS = ("blkid", "mount", "umount")
_MEMBERS = {
    "LVM2_member": "an LVM physical volume",
    "crypto_LUKS": "an encrypted volume (LUKS)",
    "linux_raid_member": "a member of a RAID",
    "swap": "swap space",
    "zfs_member": "a member of a ZFS pool",
}


@dataclass(frozen=True)
class Facts:
    """What this machine has."""

    is_root: bool
    tools: frozenset[str]
    has_nbd: bool
    """The kernel's nbd module is loaded."""
    has_fuse: bool
    has_loop: bool


@dataclass(frozen=True)
class Mount:
    """One line of `/proc/PID/mountinfo`."""

    device: str
    """major:minor."""
    path: str
    file_system: str
    source: str


def choose_method(wanted: str | None, facts: Facts, *, mounts: bool) -> str:
    """`nbd` where the kernel has it, else `fuse`; `wanted` leaves no choice.

    :param mounts: a file system is to be mounted too.
    :raises RefusedError: not root, or something is missing; the hint says what helps.
    """
    if not facts.is_root:
        raise RefusedError(
            "block devices and mounts are made by root only",
            hint="run it with sudo, and --data-dir if the node is not in /var/lib/geomirror; "
            'without root, clients use the "nbd_uri" of "geomirror status --json"',
        )
    more = _MOUNT_TOOLS if mounts else ()
    if wanted is not None:
        lacking = _lacking(wanted, facts, more)
        if lacking:
            raise RefusedError(f"cannot attach by {wanted}: {lacking[0]}", hint=lacking[1])
        return wanted
    for method in (NBD, FUSE):
        if not _lacking(method, facts, more):
            return method
    # What takes no other kernel is named first.
    lacking = _lacking(FUSE, facts, more)
    assert lacking
    also = "" if facts.has_nbd else '; or load the kernel module: "modprobe nbd"'
    raise RefusedError(f"cannot attach: {lacking[0]}", hint=lacking[1] + also)


def _lacking(method: str, facts: Facts, more: Sequence[str]) -> tuple[str, str] | None:
    """(what is missing, what helps), or None."""
    if method == NBD and not facts.has_nbd:
        return "the kernel's nbd module is not loaded", '"modprobe nbd" loads it'
    if method == FUSE and not facts.has_fuse:
        return "/dev/fuse cannot be opened", '"modprobe fuse" loads the kernel\'s part'
    if method == FUSE and not facts.has_loop:
        return "there is no /dev/loop-control", '"modprobe loop" loads the kernel\'s part'
    missing = [tool for tool in (*_TOOLS[method], *more) if tool not in facts.tools]
    if not missing:
        return None
    packages = " ".join(dict.fromkeys(_PACKAGES[tool] for tool in missing))
    return f"not installed: {', '.join(dict.fromkeys(missing))}", f'"apt install {packages}"'


def fuse_command(directory: str, descriptor: int, *, is_read_only: bool) -> list[str]:
    """nbdfuse in the foreground, over a connected socket: `directory/nbd` is the disk."""
    return [
        "nbdfuse",
        *(["--readonly"] if is_read_only else []),
        directory,
        "--fd",
        str(descriptor),
    ]


def loop_command(file: str, *, is_read_only: bool) -> list[str]:
    """A free loop device on a file; prints its name. Direct, or everything is cached twice."""
    mode = ["--read-only"] if is_read_only else []
    return ["losetup", "--find", "--show", "--direct-io=on", *mode, "--", file]


def nbd_command(socket: str, export: str, device: str, *, is_read_only: bool) -> list[str]:
    """nbd-client in the foreground; the device is there until it ends."""
    mode = ["-readonly"] if is_read_only else []
    options = ["-name", export, "-connections", "1", "-block-size", "512"]
    return ["nbd-client", "-unix", socket, device, *options, "-nofork", "-nonetlink", *mode]


def free_nbd_device(names: Sequence[str], busy: frozenset[str]) -> str:
    """The first nbd device that nobody uses.

    :param names: `nbd0`, `nbd1`, …
    :raises RefusedError: there is none.
    """
    for name in sorted(names, key=lambda name: int(name.removeprefix("nbd"))):
        if name not in busy:
            return f"/dev/{name}"
    raise RefusedError(
        f"all {len(names)} nbd devices are in use",
        hint='load the module with more: "modprobe nbd nbds_max=64"',
    )


def probe_command(device: str) -> list[str]:
    """What lies on a device, looked at anew."""
    return ["blkid", "--probe", "--output", "export", device]


def file_system_of(probed: str, volume: str) -> str:
    """The type of the file system that `probe_command` has found.

    :raises NotFoundError: there is none; says what there is.
    """
    found = dict(line.split("=", 1) for line in probed.splitlines() if "=" in line)
    kind = found.get("TYPE")
    usage = found.get("USAGE", "filesystem")
    if kind and usage == "filesystem" and kind not in _MEMBERS:
        return kind
    if kind:
        seen = _MEMBERS.get(kind, f"{kind} ({usage})")
    elif "PTTYPE" in found:
        seen = f"a partition table ({found['PTTYPE']})"
    else:
        seen = "nothing that it knows: it is empty, or was never formatted"
    raise NotFoundError(
        f'no file system on "{volume}": blkid sees {seen}',
        hint=f'"geomirror attach {volume} --device" gives the device; nothing is formatted here',
    )


def mount_command(
    device: str, path: str, kind: str, options: str, *, is_read_only: bool
) -> list[str]:
    """Mount a file system of a known type."""
    words = [word for word in (options, "ro" if is_read_only else "") if word]
    more = ["-o", ",".join(words)] if words else []
    return ["mount", "-t", kind, *more, "--", device, path]


def parse_mountinfo(text: str) -> list[Mount]:
    """All mounts of a mount namespace, in order: of two at one path the later one is seen."""
    mounts = []
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        words, more = fields.split(" "), rest.split(" ")
        if len(words) >= 5 and len(more) >= 2:
            mounts.append(Mount(words[2], _unescape(words[4]), more[0], _unescape(more[1])))
    return mounts


def _unescape(text: str) -> str:
    """Spaces, tabs and the like are written as `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def split_volume(text: str) -> tuple[str, str]:
    """`RES[/VOLUME]` taken apart; the volume is empty when none is named.

    :raises UsageError: not such a name.
    """
    resource, separator, volume = text.partition("/")
    pattern = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
    if not re.fullmatch(pattern, resource) or (separator and not re.fullmatch(pattern, volume)):
        raise UsageError(f'"{text}" is not a volume', hint="write RES or RES/VOLUME")
    return resource, volume
