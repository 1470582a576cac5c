"""QEMU's block mirror: `qemu-storage-daemon` exports the disk and mirrors it to an NBD server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

from bench.mirrors import NBD_PORT, FileMirror
from geomirror.errors import GeomirrorError
from geomirror.limits import BLOCK_BYTES

JOB = "mirror"
RECONNECT_S = 60
"""How long the client of the target tries again by itself; longer than an outage here."""
LOOK_S = 0.2


class Monitor:
    """QEMU's machine protocol over a Unix socket: one command at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._lock = asyncio.Lock()

    @classmethod
    async def connect(cls, path: Path) -> Monitor:
        """Connect and leave the negotiation mode."""
        monitor = cls(*await asyncio.open_unix_connection(path))
        await monitor._reader.readline()
        await monitor.execute("qmp_capabilities")
        return monitor

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command; what it returns. GeomirrorError with QEMU's words when it fails."""
        async with self._lock:
            message = {"execute": command, "arguments": arguments}
            self._writer.write(json.dumps(message).encode() + b"\n")
            while line := await self._reader.readline():
                answer = json.loads(line)
                if "error" in answer:
                    raise GeomirrorError(f"qemu: {command}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]
        raise GeomirrorError(f"qemu: no answer to {command}")

    async def close(self) -> None:
        """Forget the connection."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class QemuMirror(FileMirror):
    """`blockdev-mirror` in the background: changed blocks are copied in no particular order."""

    name = "qemu"
    copy_mode = "background"
    _monitor: Monitor | None = None
    _guard: asyncio.Task[None] | None = None

    async def prepare(self, image: Path) -> None:
        await super().prepare(image)
        await self.serve_target()
        socket, control = self.directory / "source.sock", self.directory / "qmp.sock"
        address = str(self.wan.node("b").ipv4)
        target = {
            "driver": "nbd",
            "node-name": "target",
            "server": {"type": "inet", "host": address, "port": str(NBD_PORT)},
            "reconnect-delay": RECONNECT_S,
        }
        command = (
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=source,filename={self.source}"),
            *("--blockdev", json.dumps(target)),
            *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
            *("--export", "type=nbd,id=export,node-name=source,name=,writable=on"),
            *("--chardev", f"socket,id=control,path={control},server=on,wait=off"),
            *("--monitor", "chardev=control"),
        )
        await self.started(self.child("qemu", "a", *command), control)
        self._monitor = await Monitor.connect(control)
        self.uri = f"nbd+unix:///?socket={socket}"
        # Both files are equal already: only what is written from now on has to be copied.
        await self._start_job("none")

    async def _start_job(self, sync: str) -> None:
        assert self._monitor is not None
        # The default, 64 KiB, would copy sixteen times what a 4 KiB write changes.
        await self._monitor.execute(
            "blockdev-mirror",
            **{"job-id": JOB, "device": "source", "target": "target", "sync": sync},
            **{"granularity": BLOCK_BYTES, "copy-mode": self.copy_mode},
            **{"on-target-error": "stop", "on-source-error": "report"},
        )

    async def begin(self) -> None:
        self._guard = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """What an operator would do: go on after an error, start again when the job is gone."""
        assert self._monitor is not None
        while True:
            jobs = await self._monitor.execute("query-block-jobs")
            if not jobs:
                self.restarts += 1
                await self._start_job("full")
            elif jobs[0]["io-status"] != "ok" or jobs[0].get("status") == "paused":
                self.restarts += 1
                with contextlib.suppress(GeomirrorError):
                    await self._monitor.execute("block-job-resume", device=JOB)
            await asyncio.sleep(LOOK_S)

    async def close(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            await asyncio.gather(self._guard, return_exceptions=True)
        if self._monitor is not None:
            await self._monitor.close()
        await super().close()


class QemuSynchronousMirror(QemuMirror):
    """The same with `write-blocking`: a write is answered when the target has it, too."""

    name = "qemu sync"
    copy_mode = "write-blocking"
