"""Taking down what an attachment left whose process is gone: killed, or lost with its helper.

The disk below is dead then: whatever is still to be written cannot be, and waiting for it would be
waiting for ever. Touched is only what is surely this attachment's: loop devices on its file, mounts
of those devices at its mountpoint, its own directory, its helper by pid and start time.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from geomirror.errors import InUseError
from geomirror.node import attach_plan as plan
from geomirror.node import attach_tools as tools
from geomirror.node.attach_device import RELEASE_S_MAX, release_loops, unmount_fuse
from geomirror.node.attach_state import Attachment, AttachmentDir
from geomirror.node.process_identity import start_time


async def clean_up(files: AttachmentDir, attachment: Attachment | None) -> list[str]:
    """Take everything down; what there was, in words. Called with the attachment's lock held.

    :raises InUseError: its device is mounted where we did not mount it, or held by somebody.
    """
    done: list[str] = []
    for device in tools.loops_on(files.disk):
        done += await _unmount(device, attachment)
        done.append(f"took {device} away")
    await _end_helper(attachment, done)
    await release_loops(files.disk, give_up_s=RELEASE_S_MAX)
    if any(found.path == str(files.fuse) for found in tools.mounts_here()):
        await unmount_fuse(files.fuse)
        done.append(f"unmounted {files.fuse}")
    files.remove()
    return done


async def _unmount(device: str, attachment: Attachment | None) -> list[str]:
    number, done = tools.device_number(device), []
    path = attachment.mountpoint if attachment is not None else None
    for found in [mount for mount in tools.mounts_here() if mount.device == number]:
        if found.path != path:
            raise InUseError(
                f"{device}, whose disk is gone, is mounted at {found.path}",
                hint=f'"umount --lazy {found.path}" takes it away',
            )
        # Lazily, since its users can do nothing with it but close it.
        await tools.run_tool(["umount", "--lazy", "--", found.path])
        done.append(f"unmounted {found.path}")
    return done


async def _end_helper(attachment: Attachment | None, done: list[str]) -> None:
    if attachment is None or not attachment.helper_pid:
        return
    if start_time(attachment.helper_pid) == attachment.helper_start_time:
        with contextlib.suppress(ProcessLookupError):
            os.kill(attachment.helper_pid, signal.SIGKILL)
        done.append(f"ended process {attachment.helper_pid}")
    device = attachment.device
    if attachment.method == plan.NBD and device is not None and _is_its_device(attachment):
        await tools.run_tool(["nbd-client", "-d", device], may_fail=True)
        done.append(f"disconnected {device}")


def _is_its_device(attachment: Attachment) -> bool:
    """Whether the kernel still names our helper as the nbd device's."""
    try:
        text = Path("/sys/block", Path(attachment.device or "").name, "pid").read_text()
    except OSError:
        return False
    return text.strip() == str(attachment.helper_pid)
