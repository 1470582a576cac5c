"""`geomirror node run`: the process around a node: loop, signals, logs, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import structlog

from geomirror.config import Config
from geomirror.errors import GeomirrorError
from geomirror.node.config_io import load_config
from geomirror.node.lock_io import DaemonLock
from geomirror.node.log import set_up_logging
from geomirror.node.node import Node, refuse_optimized_python
from geomirror.node.paths import DataDir
from geomirror.node.service import ServiceFactory
from geomirror.tunnel.network_state_io import NetworkState, load_network

_log = structlog.get_logger(component="node")


def run_node(data_dir: DataDir) -> None:
    """Serve until SIGTERM or SIGINT.

    :raises GeomirrorError: the node cannot start: no network, locked, configuration, storage.
    """
    from geomirror.node.replica_service import ReplicaService

    refuse_optimized_python()
    os.umask(0o077)
    config = load_config(data_dir.config)
    state = load_network(data_dir.root, config.limits())
    set_up_logging(config.log.level, config.log.format, state.node)
    lock = DaemonLock(data_dir)
    try:
        with _new_runner() as runner:
            runner.run(serve(data_dir, config, state, ReplicaService))
    finally:
        lock.release()


def _new_runner() -> asyncio.Runner:
    try:
        import uvloop
    except ImportError:
        return asyncio.Runner()
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


async def serve(
    data_dir: DataDir, config: Config, state: NetworkState, factory: ServiceFactory
) -> None:
    """Start a node, wait for a signal or a failure, stop it."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    node = Node(data_dir, config, state, factory)
    loop.add_signal_handler(signal.SIGHUP, node.reload)
    starting = asyncio.ensure_future(node.start())
    waiting = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            assert node.failed is not None
            await asyncio.wait((waiting, node.failed), return_when=asyncio.FIRST_COMPLETED)
            if node.failed.done():
                error = node.failed.result()
                _log.error("node_failed", exc_info=error)
                raise GeomirrorError(f"the node failed: {error}") from error
        _log.info("stopping")
    finally:
        waiting.cancel()
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
        await node.stop()
