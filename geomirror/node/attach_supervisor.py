"""The process of one attachment: it serves the relay, keeps the device, and takes it down again.

It is no child of the daemon and outlives its restarts. It owns every step, also those of a
detach: `geomirror detach` asks it through its control socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from geomirror.environment import SystemClock
from geomirror.errors import GeomirrorError, InUseError, RefusedError, StorageError
from geomirror.limits import PRODUCTION
from geomirror.nbd.resuming_export_io import ResumingExport
from geomirror.nbd.scratch_export_io import ScratchExport
from geomirror.nbd.server_io import NbdServer
from geomirror.node import attach_plan as plan
from geomirror.node import attach_tools as tools
from geomirror.node.attach_device import RELEASE_S_MAX, AttachedDevice
from geomirror.node.attach_state import Attachment, AttachmentDir
from geomirror.node.attach_upstream import Upstream
from geomirror.node.process_identity import start_time

_log = structlog.get_logger(component="attach")
BUSY_RETRY_S = 1.0
"""After SIGTERM, between attempts to unmount what is in use."""
FORCED_RETRY_S = 0.1
FORCED_ATTEMPTS = 50


@dataclass(frozen=True)
class Wanted:
    """What `attach` was asked for."""

    mountpoint: str | None
    is_read_only: bool
    options: str
    timeout_s: float | None
    """How long the daemon may be away before requests fail; None: for ever."""


class Supervisor:
    """One attachment, from the first step to the last."""

    def __init__(
        self, upstream: Upstream, files: AttachmentDir, method: str, wanted: Wanted
    ) -> None:
        self._upstream = upstream
        self._files = files
        self._wanted = wanted
        self._clock = SystemClock()
        self.attachment = Attachment(
            resource=upstream.resource,
            volume=upstream.volume,
            method=method,
            mountpoint=wanted.mountpoint,
            pid=os.getpid(),
            start_time=start_time(os.getpid()),
        )
        timeout_s = wanted.timeout_s
        self._export = ResumingExport(
            upstream.name,
            upstream.connect,
            clock=self._clock,
            limits=PRODUCTION,
            timeout_ns=None if timeout_s is None else int(timeout_s * 1e9),
            on_error=self._told_error,
        )
        self._scratch: ScratchExport | None = None
        self._server = NbdServer(
            lambda: {upstream.name: self._scratch or self._export}, default=upstream.name
        )
        self._device = AttachedDevice(files, self.attachment, self._server)
        self._relaying: asyncio.Task[None] | None = None
        self._detaching = asyncio.Lock()
        self._leaving: asyncio.Task[None] | None = None
        """Under way once nothing is mounted: ends when nobody uses the device any more."""
        self._is_leaving = False
        self._is_clean = True
        self._errors = 0
        self.ended = asyncio.Event()
        """Everything is taken down."""

    # ---- up

    async def attach(self) -> None:
        """Make the device and mount it; nothing is left when it fails.

        :raises GeomirrorError: why it cannot be attached.
        """
        await self._export.start()
        self._relaying = asyncio.create_task(self._export.run())
        identity = self._upstream.identity
        assert identity is not None
        self.attachment.is_read_only = self._wanted.is_read_only or identity.is_read_only
        self._export.is_read_only = self.attachment.is_read_only
        self.attachment.epoch = identity.epoch
        self.attachment.attached_at = datetime.now(UTC).isoformat(timespec="seconds")
        if identity.is_read_only and not self._wanted.is_read_only and self._wanted.mountpoint:
            # A copy is a crash image: to mount it, its file system has to replay its journal.
            self._scratch = ScratchExport(
                self._export, self._files.path / "scratch", PRODUCTION.attach_scratch_bytes_max
            )
            self.attachment.has_scratch = True
        self._files.save(self.attachment)
        try:
            device = await self._device.make()
            if self._wanted.mountpoint is not None:
                await self._mount(device, self._wanted.mountpoint)
        except BaseException:
            await self._unmake()
            raise

    async def _mount(self, device: str, path: str) -> None:
        probed = await tools.run_tool(plan.probe_command(device), may_fail=True)
        kind = plan.file_system_of(probed, self.attachment.name)
        self.attachment.file_system = kind
        is_read_only = self.attachment.is_read_only
        self.attachment.is_mounted = True
        self._files.save(self.attachment)
        try:
            await tools.run_tool(
                plan.mount_command(
                    device, path, kind, self._wanted.options, is_read_only=is_read_only
                )
            )
        except StorageError:
            self.attachment.is_mounted = False
            raise

    async def watch(self) -> None:
        """Return when everything is taken down.

        :raises StorageError: the helper ended before that; what stands on it is dead.
        """
        helper = asyncio.create_task(self._device.wait_helper())
        ended = asyncio.create_task(self.ended.wait())
        try:
            await asyncio.wait((helper, ended), return_when=asyncio.FIRST_COMPLETED)
            if helper.done() and not self._is_leaving:
                code = helper.result()
                self.attachment.failure = f"its {self.attachment.method} helper ended ({code})"
                self._files.save(self.attachment)
                raise StorageError(
                    f'"{self.attachment.name}": {self.attachment.failure}',
                    hint=f'"geomirror detach {self.attachment.name}" cleans up',
                )
            await ended
        finally:
            for task in (helper, ended):
                task.cancel()

    # ---- down

    async def detach(self, *, is_lazy: bool, is_forced: bool) -> dict[str, Any]:
        """Unmount, flush, take the device away, end. Says whether all was written.

        :raises InUseError: somebody uses it: it stays attached, or, once it is unmounted, ends
            when they do.
        :raises RefusedError: the daemon is away, so that nothing can be written.
        """
        async with self._detaching:
            if self._leaving is None:
                self._check_daemon(is_forced=is_forced)
                await self._unmount(is_lazy=is_lazy)
                if not is_lazy:
                    await self._check_users()
                self._leaving = asyncio.create_task(self._leave())
            if not is_lazy:
                await self._wait_left(self._leaving)
        return {"name": self.attachment.name, "is_clean": self._is_clean, "is_gone": not is_lazy}

    def _check_daemon(self, *, is_forced: bool) -> None:
        name, is_writable = self.attachment.name, not self.attachment.is_read_only
        if is_forced:
            self._is_clean = not is_writable
            self._export.give_up()
        elif self._export.is_over:
            self._is_clean = not is_writable
        elif self._export.away_since_ns is not None and is_writable:
            raise RefusedError(
                f'"{name}": the daemon is away, and what is not written yet would be lost',
                hint='start it, or give it up with "--force"',
            )

    async def _wait_left(self, leaving: asyncio.Task[None]) -> None:
        done, _ = await asyncio.wait({leaving}, timeout=RELEASE_S_MAX)
        if done:
            self._leaving = None
            leaving.result()
            return
        device = self.attachment.device or "the device"
        users = await asyncio.to_thread(tools.users_of, None, device)
        users += await asyncio.to_thread(tools.mounted_elsewhere, device)
        raise InUseError(
            f"{device} is unmounted, and still in use by {tools.in_words(users)}",
            hint="it is detached when they end",
        )

    async def _unmount(self, *, is_lazy: bool) -> None:
        device, path = self.attachment.device, self.attachment.mountpoint
        if device is None:
            return
        number = tools.device_number(device)
        mine = [found for found in tools.mounts_here() if found.device == number]
        if self.attachment.is_mounted and any(found.path == path for found in mine):
            assert path is not None
            await self._unmount_at(path, device, is_lazy=is_lazy)
        self.attachment.is_mounted = False
        others = [found.path for found in tools.mounts_here() if found.device == number]
        if others and not is_lazy:
            raise InUseError(f"{device} is mounted at {', '.join(others)}", hint="unmount it first")

    async def _unmount_at(self, path: str, device: str, *, is_lazy: bool) -> None:
        lazy = ["--lazy"] if is_lazy else []
        # Killed processes that waited for the daemon end only when their requests have failed.
        for attempt in range(FORCED_ATTEMPTS if self._export.is_over else 1):
            await asyncio.sleep(attempt and FORCED_RETRY_S)
            try:
                await tools.run_tool(["umount", *lazy, "--", path])
                return
            except StorageError as error:
                failure = error
        users = await asyncio.to_thread(tools.users_of, path, device)
        raise InUseError(
            f"{path} is in use by {tools.in_words(users)}",
            hint="end them, or use --lazy: it ends when they do",
        ) from failure

    async def _check_users(self) -> None:
        device = self.attachment.device
        users = await asyncio.to_thread(tools.users_of, None, device) if device else []
        if users:
            raise InUseError(f"{device} is in use by {tools.in_words(users)}", hint="end them")

    async def _leave(self) -> None:
        device = self.attachment.device
        if device is not None and not self.attachment.is_read_only:
            try:
                await asyncio.to_thread(tools.sync_device, device)
            except StorageError:
                if not self._export.is_over:
                    raise
        self._is_leaving = True
        await self._device.release()
        await self._end()

    async def _unmake(self) -> None:
        """After a failed attach."""
        self._is_leaving = True
        with contextlib.suppress(GeomirrorError):
            if self.attachment.is_mounted:
                await self._unmount(is_lazy=False)
            await self._device.release()
        await self._end()

    async def _end(self) -> None:
        await self._server.stop()
        if self._relaying is not None:
            self._relaying.cancel()
            await asyncio.gather(self._relaying, return_exceptions=True)
        if self._scratch is not None:
            self._scratch.end()
        self._files.remove()
        self.ended.set()

    async def stop(self) -> None:
        """SIGTERM: detach as soon as nobody uses it; until then everything works on."""
        is_told = False
        while not self.ended.is_set():
            try:
                await self.detach(is_lazy=False, is_forced=False)
            except GeomirrorError as error:
                if not is_told:
                    _log.warning("stop_waits", error=str(error))
                is_told = True
                await asyncio.sleep(BUSY_RETRY_S)

    # ---- what it says

    def _told_error(self, command: int, number: int) -> None:
        self._errors += 1
        if self._errors == 1:
            _log.warning("request_failed", command=command, error=errno.errorcode.get(number))

    def view(self) -> dict[str, Any]:
        """The attachment as `attach --list` shows it."""
        away_ns, reason = self._export.away_since_ns, self._export.reason
        state = "attached"
        if self._is_leaving or (self._leaving is not None and not self._leaving.done()):
            state = "detaching"
        elif self._export.is_over or (self._errors and self.attachment.epoch is not None):
            state = "stale"
        elif away_ns is not None:
            state = "waiting"
        waiting_s = 0.0 if away_ns is None else (self._clock.now_ns() - away_ns) / 1e9
        return {
            **view_of(self.attachment),
            "state": state,
            "reason": str(reason) if reason is not None else None,
            "waiting_seconds": round(waiting_s, 3),
            "waiting_requests": self._export.unanswered,
            "replayed_requests": self._export.replayed,
            "errors": self._errors,
            "scratch_bytes": self._scratch.scratch_bytes if self._scratch is not None else 0,
        }


def view_of(attachment: Attachment) -> dict[str, Any]:
    """What is known without the process."""
    return {
        "name": attachment.name,
        "resource": attachment.resource,
        "volume": attachment.volume,
        "method": attachment.method,
        "device": attachment.device,
        "mountpoint": attachment.mountpoint,
        "file_system": attachment.file_system,
        "is_read_only": attachment.is_read_only,
        "epoch": attachment.epoch,
        "pid": attachment.pid,
        "attached_at": attachment.attached_at,
    }


def install_signals(supervisor: Supervisor) -> Callable[[], None]:
    """SIGTERM and SIGINT detach; returns what undoes it."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    def stop() -> None:
        if not tasks:
            tasks.append(asyncio.create_task(supervisor.stop()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)

    def undo() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        for task in tasks:
            task.cancel()

    return undo
