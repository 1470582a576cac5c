"""`geomirror node run`: the process around a node: lock, loop, signals, logs.

The lock is taken before anything heavy is imported, so that commands given a moment after the
start wait for the daemon instead of missing it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from geomirror.errors import GeomirrorError
from geomirror.node.activation_io import ActivatedSocket, close_all, take_activated_sockets
from geomirror.node.file_limit import raise_file_limit
from geomirror.node.lock_io import DaemonLock
from geomirror.node.paths import DataDir

if TYPE_CHECKING:
    from geomirror.config import Config
    from geomirror.node.service import ServiceFactory
    from geomirror.tunnel.network_state_io import NetworkState


SWITCH_S = 0.0005
"""A tenth of the interpreter's default (`bench costs`)."""
EXIT_UNFINISHED = 1
"""An orderly stop ran out of time; the next start recovers."""


def run_node(data_dir: DataDir) -> None:
    """Serve until SIGTERM or SIGINT.

    :raises GeomirrorError: the node cannot start: no network, locked, configuration, storage.
    """
    refuse_optimized_python()
    os.umask(0o077)
    raise_file_limit()
    share_interpreter()
    activated = take_activated_sockets()
    # Without a network the directory may be anybody's: `load_network` says so, nothing is made.
    lock = DaemonLock(data_dir) if (data_dir.root / "network").is_dir() else None
    try:
        _run_locked(data_dir, activated)
    finally:
        close_all(activated)
        if lock is not None:
            lock.release()


def refuse_optimized_python() -> None:
    """:raises GeomirrorError: assertions are switched off, and invariants with them."""
    if not __debug__ or os.environ.get("PYTHONOPTIMIZE"):
        raise GeomirrorError("does not run with python -O", hint="unset PYTHONOPTIMIZE")


def _run_locked(data_dir: DataDir, activated: list[ActivatedSocket]) -> None:
    from geomirror.node.config_io import load_config
    from geomirror.node.log import set_up_logging
    from geomirror.node.nbd_listeners import check_names
    from geomirror.node.replica_service import ReplicaService
    from geomirror.tunnel.network_state_io import check_staying, load_network

    check_names(activated)
    check_staying(data_dir.root)
    config = load_config(data_dir.config)
    state = load_network(data_dir.root, config.limits())
    set_up_logging(config.log.level, config.log.format, state.node)
    with _new_runner() as runner:
        runner.run(serve(data_dir, config, state, ReplicaService, activated))


def _new_runner() -> asyncio.Runner:
    try:
        import uvloop
    except ImportError:
        return asyncio.Runner()
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def share_interpreter() -> None:
    """Let the loop take the interpreter from a thread that computes after `SWITCH_S`.

    By default it waits for 5 ms each time that it comes back from a system call, of which a write
    and its flush have eight.
    """
    sys.setswitchinterval(SWITCH_S)


def keep_what_is_loaded() -> None:
    """Leave everything that is there now out of garbage collections.

    Nearly all of it, 70,000 objects, is code. A full collection goes through them while it holds
    the interpreter, and a flush that comes then waits for it.
    """
    gc.collect()
    gc.freeze()


def report_unless_hung_up(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The loop's report of an exception that nobody took.

    uvloop has one for each caller that hangs up during its TLS handshake, which anybody may do.
    """
    is_untaken = "never retrieved" in str(context.get("message"))
    if not (is_untaken and isinstance(context.get("exception"), ConnectionError)):
        loop.default_exception_handler(context)


async def serve(
    data_dir: DataDir,
    config: Config,
    state: NetworkState,
    factory: ServiceFactory,
    activated: Sequence[ActivatedSocket] = (),
) -> None:
    """Start a node, wait for a signal or a failure, stop it.

    :raises GeomirrorError: it could not start, or a part that must run for ever has ended.
    """
    from geomirror.node.node import Node

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(report_unless_hung_up)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    node = Node(data_dir, config, state, factory)
    loop.add_signal_handler(signal.SIGHUP, node.reload)
    starting = asyncio.ensure_future(node.start(activated))
    waiting = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            keep_what_is_loaded()
            await asyncio.wait((waiting, node.failed), return_when=asyncio.FIRST_COMPLETED)
            if node.failed.done():
                error = node.failed.result()
                raise GeomirrorError(f"the node failed: {error!r}") from error
    finally:
        waiting.cancel()
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
        if not await node.stop():
            # A thread may hang in a dead disk; waiting for it would be waiting for ever.
            sys.stderr.flush()
            os._exit(EXIT_UNFINISHED)
