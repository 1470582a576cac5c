"""Does on this host what a tunnel plan says: runs `ip` and `wg`, serves interfaces, reads what is.

An interface is a device of the kernel where it knows WireGuard, else a `wireguard-go` process: our
child, which the kernel kills when this process ends, however it ends. Interfaces of such a process
are gone with it; routes to them, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from geomirror.errors import LinkError, RefusedError
from geomirror.node.attach_tools import tool_environment
from geomirror.node.process_identity import death_signal
from geomirror.tunnel.wireguard_actual import (
    TABLE,
    Actual,
    InterfaceState,
    parse_addresses,
    parse_rules,
    parse_table,
    parse_wg_dump,
)
from geomirror.tunnel.wireguard_plan import Remove, Run, Start, Step

_log = structlog.get_logger(component="tunnel")

SOCKETS = Path("/var/run/wireguard")
"""Where wireguard-go and wg meet; shared by all network namespaces."""
TOOL_S_MAX = 10.0
"""`ip` and `wg` take milliseconds."""
START_S_MAX = 5.0
"""From the start of a process until it answers `wg`."""
POLL_S = 0.02
SMALL_HOST_CPUS = 2
"""Up to so many, one thread for wireguard-go: 30 % less CPU for the same rate."""


class TunnelHost:
    """The interfaces of one node. On the event loop.

    :param tag: first part of their names.
    :param ended: told the interface whose process has ended without being asked to.
    """

    def __init__(self, tag: str, ended: Callable[[str], None]) -> None:
        self._tag = tag
        self._ended = ended
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._starting: set[str] = set()
        self._watchers: set[asyncio.Task[None]] = set()
        self.is_kernel: bool | None = None
        """Whether the kernel makes the interfaces; None: not tried yet."""

    def check(self) -> None:
        """:raises RefusedError: this host cannot have tunnels; the message says what it lacks."""
        path = tool_environment()["PATH"]
        if os.geteuid() != 0:
            raise RefusedError("WireGuard tunnels need root", hint="run the daemon as root")
        for tool, package in (("ip", "iproute2"), ("wg", "wireguard-tools")):
            if shutil.which(tool, path=path) is None:
                raise RefusedError(
                    f"the program {tool} is not installed",
                    hint=f'install it with "apt-get install {package}"',
                )

    async def look(self) -> Actual:
        """What is there now. :raises LinkError: a tool failed."""
        families = ["-4", "-6"] if has_ipv6() else ["-4"]
        found, *tables = await asyncio.gather(
            self._tool("ip", "-j", "address", "show"),
            *(self._table("ip", "-j", family, "route", "show") for family in families),
            *(self._tool("ip", "-j", family, "rule", "show") for family in families),
        )
        actual = Actual()
        interfaces, actual.addresses = parse_addresses(found, self._tag)
        for data in tables[: len(families)]:
            actual.routes |= parse_table(data)
        for data in tables[len(families) :]:
            actual.rules += parse_rules(data)
        states = await asyncio.gather(
            *(self._configured(name, state) for name, state in interfaces.items())
        )
        actual.interfaces = dict(zip(interfaces, states, strict=True))
        return actual

    async def run(self, steps: Sequence[Step]) -> dict[str, str]:
        """Do the steps in order.

        :returns: interface → why a step of it failed; its further steps were left out.
        :raises LinkError: a step that is about no interface failed; the rest was not done.
        """
        failures: dict[str, str] = {}
        for step in steps:
            if step.interface in failures:
                continue
            try:
                await self._do(step)
            except LinkError as error:
                if step.interface is None:
                    raise
                failures[step.interface] = error.message
        return failures

    async def stop(self) -> None:
        """End all processes; their interfaces and the routes to them are gone after it."""
        for name in list(self._children):
            await self._end_child(name)
        if self.is_kernel:
            with contextlib.suppress(LinkError):
                for name in (await self.look()).interfaces:
                    await self._tool("ip", "link", "delete", "dev", name)
        self.remove_sockets()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    def remove_sockets(self) -> None:
        """Remove what processes that were killed have left in the directory of sockets."""
        for path in SOCKETS.glob(f"{self._tag}*.sock"):
            if path.stem not in self._children:
                path.unlink(missing_ok=True)

    def pid_of(self, interface: str) -> int | None:
        """The process that serves an interface."""
        child = self._children.get(interface)
        return child.pid if child is not None else None

    # ---- steps

    async def _do(self, step: Step) -> None:
        if isinstance(step, Start):
            await self._start(step.interface)
        elif isinstance(step, Remove):
            await self._remove(step.interface)
        else:
            await self._run(step)

    async def _run(self, step: Run) -> None:
        stdin = step.stdin.reveal() if step.stdin is not None else None
        code, _, said = await _tool(step.arguments, stdin)
        if code and stdin is not None:
            # wg repeats a line that it does not like, and the line may be a key.
            said = " ".join(line for line in said.splitlines() if "`" not in line)
        if code:
            raise LinkError(f"{' '.join(step.arguments)}: {said or f'exit {code}'}")

    async def _start(self, name: str) -> None:
        if self.is_kernel is not False:
            code, _, said = await _tool(("ip", "link", "add", "dev", name, "type", "wireguard"))
            self.is_kernel = code == 0
            if code == 0:
                return
            _log.info("kernel_without_wireguard", said=said)
        path = shutil.which("wireguard-go", path=tool_environment()["PATH"])
        if path is None or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            missing = "/dev/net/tun" if path else "wireguard-go"
            raise LinkError(
                f"the kernel does not know WireGuard, and there is no {missing}",
                hint='install the module, or "apt-get install wireguard-go"',
            )
        await self._start_child(name, path)

    async def _start_child(self, name: str, path: str) -> None:
        environment = {**tool_environment(), "LOG_LEVEL": "error"}
        if len(os.sched_getaffinity(0)) <= SMALL_HOST_CPUS:
            environment["GOMAXPROCS"] = "1"
        child = await asyncio.create_subprocess_exec(
            *(path, "-f", name),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            preexec_fn=death_signal(),
            cwd="/",
        )
        self._children[name] = child
        self._starting.add(name)
        try:
            await self._until_ready(name, child)
        finally:
            self._starting.discard(name)

    async def _until_ready(self, name: str, child: asyncio.subprocess.Process) -> None:
        watcher = asyncio.get_running_loop().create_task(self._watch(name, child))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_S_MAX):
                while child.returncode is None:
                    code, _, _ = await _tool(("wg", "show", name, "listen-port"))
                    if code == 0:
                        return
                    await asyncio.sleep(POLL_S)
        ended = child.returncode
        await self._end_child(name)
        said = "does not answer" if ended is None else f"ended with {ended}"
        raise LinkError(f"wireguard-go {said}")

    async def _watch(self, name: str, child: asyncio.subprocess.Process) -> None:
        code = await child.wait()
        if self._children.get(name) is child:
            del self._children[name]
            _log.warning("wireguard_go_ended", interface=name, code=code)
            # While it is being started, whoever starts it is told.
            if name not in self._starting:
                self._ended(name)

    async def _remove(self, name: str) -> None:
        if name in self._children:
            await self._end_child(name)
        if name in (interface for _, interface in socket.if_nameindex()):
            await self._tool("ip", "link", "delete", "dev", name)
        (SOCKETS / f"{name}.sock").unlink(missing_ok=True)

    async def _end_child(self, name: str) -> None:
        child = self._children.pop(name, None)
        if child is not None:
            # It has nothing to save; the kernel removes its interface.
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
            (SOCKETS / f"{name}.sock").unlink(missing_ok=True)

    # ---- reading

    async def _configured(self, name: str, state: InterfaceState) -> InterfaceState:
        code, output, _ = await _tool(("wg", "show", name, "dump"))
        if code:
            return state
        private_key, port, peers = parse_wg_dump(output.decode("ascii", "replace"))
        return InterfaceState(state.is_up, state.mtu, private_key, port, peers)

    async def _tool(self, *arguments: str) -> bytes:
        code, output, said = await _tool(arguments)
        if code:
            raise LinkError(f"{' '.join(arguments)}: {said or f'exit {code}'}")
        return output

    async def _table(self, *arguments: str) -> bytes:
        code, output, said = await _tool((*arguments, "table", str(TABLE)))
        if code and "FIB table does not exist" not in said:
            raise LinkError(f"{' '.join(arguments)}: {said}")
        return b"" if code else output


def has_ipv6() -> bool:
    """Whether the loopback device and new interfaces get IPv6 addresses."""
    try:
        names = [Path(f"/proc/sys/net/ipv6/conf/{n}/disable_ipv6") for n in ("lo", "default")]
        return all(path.read_text(encoding="ascii").strip() == "0" for path in names)
    except OSError:
        return False


def _filled_pipe(data: bytes) -> int:
    # The loop's own pipes are sockets, which wg cannot open as /dev/stdin.
    assert len(data) <= select.PIPE_BUF, "would block"
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    return reader


async def _tool(arguments: Sequence[str], stdin: bytes | None = None) -> tuple[int, bytes, str]:
    source = asyncio.subprocess.DEVNULL if stdin is None else _filled_pipe(stdin)
    try:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=source,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=tool_environment(),
            start_new_session=True,
            cwd="/",
        )
    except OSError as error:
        raise LinkError(f"{arguments[0]}: {error.strerror}") from None
    finally:
        if stdin is not None:
            os.close(source)
    try:
        async with asyncio.timeout(TOOL_S_MAX):
            output, errors = await process.communicate()
    except TimeoutError:
        raise LinkError(f"{' '.join(arguments)}: no end after {TOOL_S_MAX:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output, errors.decode(errors="replace").strip()
