"""A relayed disk as a block device: nbdfuse and a loop device, or nbd-client, made and unmade.

Made in this order, unmade in the reverse one, each step waited for: the loop device must be gone
before nbdfuse's mount, that before nbdfuse, and that before the relay, or the kernel hangs on
writes that nobody takes any more. Nothing here touches a file of the disk on the event loop, which
has to serve it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from geomirror.errors import InUseError, StorageError, WaitTimeoutError
from geomirror.nbd.server_io import NbdServer
from geomirror.node import attach_plan as plan
from geomirror.node import attach_tools as tools
from geomirror.node.attach_state import Attachment, AttachmentDir
from geomirror.node.process_identity import death_signal, start_time

READY_S_MAX = 30.0
"""nbdfuse shows its file, and nbd-client its device, within milliseconds."""
RELEASE_S_MAX = 10.0
"""Taking a loop device away is asynchronous, and fails while another namespace has it mounted."""
END_S_MAX = 10.0
"""A helper whose mount is gone ends by itself."""
_POLL_S = 0.02


class AttachedDevice:
    """The device of one attachment; `attachment` is kept true, and saved, step by step."""

    def __init__(self, files: AttachmentDir, attachment: Attachment, server: NbdServer) -> None:
        self._files = files
        self._attachment = attachment
        self._server = server
        self._helper: asyncio.subprocess.Process | None = None

    async def make(self) -> str:
        """The path of the new device.

        :raises StorageError: a tool failed. :raises WaitTimeoutError: it is not ready in time.
        """
        if self._attachment.method == plan.FUSE:
            await self._start_fuse()
            device = await tools.run_tool(
                plan.loop_command(str(self._files.disk), is_read_only=self._is_read_only)
            )
        else:
            device = await self._start_nbd()
        self._attachment.device = device
        self._files.save(self._attachment)
        return device

    @property
    def _is_read_only(self) -> bool:
        return self._attachment.is_read_only and not self._attachment.has_scratch

    async def _start_fuse(self) -> None:
        self._files.fuse.mkdir(mode=0o700, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs:
            await self._server.serve(ours)
            command = plan.fuse_command(
                str(self._files.fuse), theirs.fileno(), is_read_only=self._is_read_only
            )
            await self._start(command, [theirs.fileno()])
        disk = self._files.disk
        await self._wait_ready(disk.exists, f"{disk} to appear")

    async def _start_nbd(self) -> str:
        device = plan.free_nbd_device(*tools.nbd_devices())
        # Through the directory's descriptor: a socket's path is short, a data directory's may not.
        directory = os.open(self._files.path, os.O_PATH | os.O_CLOEXEC)
        try:
            path = f"/proc/{os.getpid()}/fd/{directory}/nbd.sock"
            await self._server.start_unix(path)
            name = self._attachment.name
            await self._start(
                plan.nbd_command(path, name, device, is_read_only=self._is_read_only), []
            )
            size = Path("/sys/block", Path(device).name, "size")
            await self._wait_ready(lambda: int(size.read_text()) > 0, f"{device} to have a size")
        finally:
            os.close(directory)
        return device

    async def _start(self, command: Sequence[str], descriptors: Sequence[int]) -> None:
        self._helper = await asyncio.create_subprocess_exec(
            *command,
            pass_fds=descriptors,
            stdin=asyncio.subprocess.DEVNULL,
            # What it says belongs to the log; stdout is for whoever waits for us to be ready.
            stdout=2,
            env=tools.tool_environment(),
            start_new_session=True,
            cwd="/",
            preexec_fn=death_signal(),
        )
        self._attachment.helper_pid = self._helper.pid
        self._attachment.helper_start_time = start_time(self._helper.pid)
        self._files.save(self._attachment)

    async def _wait_ready(self, is_ready: Callable[[], bool], what: str) -> None:
        helper = self._helper
        assert helper is not None
        try:
            async with asyncio.timeout(READY_S_MAX):
                while not await asyncio.to_thread(is_ready):
                    if helper.returncode is not None:
                        raise StorageError(
                            f"{self._attachment.method} helper ended with {helper.returncode}",
                            hint=f"see {self._files.log}",
                        )
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise WaitTimeoutError(f"waited {READY_S_MAX:g} s for {what}") from None

    async def wait_helper(self) -> int:
        """Until nbdfuse or nbd-client ends; its exit code."""
        assert self._helper is not None
        return await self._helper.wait()

    async def release(self) -> None:
        """Take everything away, however long somebody still uses the device."""
        device = self._attachment.device
        if self._attachment.method == plan.FUSE:
            await release_loops(self._files.disk, give_up_s=None)
            self._attachment.device = None
            await unmount_fuse(self._files.fuse)
        elif device is not None and self._helper is not None and self._helper.returncode is None:
            await tools.run_tool(["nbd-client", "-d", device], may_fail=True)
        await self._end_helper()

    async def _end_helper(self) -> None:
        helper = self._helper
        if helper is None:
            return
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if helper.returncode is None and number is not None:
                with contextlib.suppress(ProcessLookupError):
                    helper.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(helper.wait(), END_S_MAX)
                return


async def release_loops(disk: Path, *, give_up_s: float | None) -> None:
    """Take away the loop devices on a file, and wait until they are gone.

    :raises InUseError: one is still used; it goes by itself when its last user does.
    """
    for device in tools.loops_on(disk):
        await tools.run_tool(["losetup", "--detach", device], may_fail=True)
    try:
        async with asyncio.timeout(give_up_s):
            while found := tools.loops_on(disk):
                device = found[0]
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        users = await asyncio.to_thread(tools.users_of, None, device)
        users += await asyncio.to_thread(tools.mounted_elsewhere, device)
        raise InUseError(
            f"{device} is still in use by {tools.in_words(users)}",
            hint="end them; then detach again",
        ) from None


async def unmount_fuse(path: Path) -> None:
    """Unmount nbdfuse; it then ends by itself."""
    while any(found.path == str(path) for found in tools.mounts_here()):
        await tools.run_tool(["umount", "--lazy", "--", str(path)])
