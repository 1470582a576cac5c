"""One node: composes network, links, resources, NBD server and control socket, and runs them.

Start: lock, NBD socket, links, control socket, resources, ready. Stop: the same backwards, within
ten seconds; after that the process ends anyway, and recovery does the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from geomirror import __version__
from geomirror.config import RELOADABLE, Config, changed_keys
from geomirror.environment import SECOND, SystemClock, SystemEntropy
from geomirror.errors import ConfigError, GeomirrorError
from geomirror.nbd.server_io import NbdServer
from geomirror.node.activation_io import ActivatedSocket
from geomirror.node.audit import AuditLog
from geomirror.node.branch_calls import BranchCalls
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.config_io import load_config
from geomirror.node.context import NodeContext
from geomirror.node.control_io import ControlServer
from geomirror.node.definition_push import DefinitionPush
from geomirror.node.definition_store import DefinitionStore
from geomirror.node.drill_calls import DrillCalls
from geomirror.node.events import EventRing
from geomirror.node.failover_calls import FailoverCalls
from geomirror.node.hearsay import Hearsay
from geomirror.node.held_calls import HeldCalls
from geomirror.node.leave_calls import LeaveCalls
from geomirror.node.lifecycle_calls import LifecycleCalls
from geomirror.node.link_router import LinkRouter
from geomirror.node.log import set_level
from geomirror.node.mark_calls import MarkCalls
from geomirror.node.nbd_listeners import NbdAddresses, load_nbd_tls, start_nbd, warn_if_exposed
from geomirror.node.network_calls import NetworkCalls
from geomirror.node.notify_io import Notifier
from geomirror.node.paths import DataDir
from geomirror.node.promotion_calls import PromotionCalls
from geomirror.node.refusals import RefusalAllowance
from geomirror.node.rejoiner import Rejoiner
from geomirror.node.resolve_calls import ResolveCalls
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.resource_changes import ResourceChanges
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.node.resource_host import ResourceHost, remove_tree
from geomirror.node.rewind_calls import RewindCalls
from geomirror.node.rfc3339 import rfc3339
from geomirror.node.roster import Roster
from geomirror.node.service import Service, ServiceFactory
from geomirror.node.service_calls import ServiceCalls
from geomirror.node.status import StatusReport
from geomirror.node.tunnel_calls import TunnelCalls
from geomirror.node.tunnel_service import TunnelService
from geomirror.node.verify_calls import VerifyCalls
from geomirror.node.view_calls import ViewCalls
from geomirror.node.volume_changes import VolumeChanges
from geomirror.node.way_out import load_way_out, websocket_tls, websocket_url
from geomirror.tunnel.link_path import expand_paths
from geomirror.tunnel.membership import Member
from geomirror.tunnel.network_state_io import NetworkState
from geomirror.tunnel.tls_io import TlsDriver
from geomirror.wan_protocol.streams_io import PeerAddress, PeerLinks

_log = structlog.get_logger(component="node")

ENFORCE_INTERVAL_S = 1.0
"""Between two looks at the certificates of live links."""
STOP_S_MAX = 10.0
"""A graceful stop takes no longer."""


class StatusRequest(Parameters, frozen=True):
    """`status`"""

    name: str | None = None


class Node:
    """The running daemon. Make it on the loop, then `start`, then `stop`; once."""

    def __init__(
        self, data_dir: DataDir, config: Config, state: NetworkState, factory: ServiceFactory
    ) -> None:
        self._data_dir = data_dir
        self._config = config
        self._state = state
        self._clock, entropy = SystemClock(), SystemEntropy()
        self._started_ns = self._clock.now_ns()
        limits = config.limits()
        self.notifier = Notifier()
        self._events = EventRing()
        self._refusals = RefusalAllowance()
        self._methods = MethodRegistry()
        self._executor = ThreadPoolExecutor(config.node.worker_threads, "geomirror-worker")
        self._router = LinkRouter()
        self._driver = TlsDriver(
            state, self._clock, entropy, refused=self._refused, joined=self._joined
        )
        self._links = PeerLinks(
            state.node, limits, self._clock, entropy, self._driver, self._router
        )
        context = NodeContext(
            state.node,
            state.site,
            data_dir.root,
            limits,
            self._clock,
            entropy,
            self._links,
            self._emit,
            self._executor,
            is_single_writer=config.nbd.single_writer,
            is_read_only=config.nbd.read_only,
        )
        self._store = DefinitionStore(data_dir.resources_file)
        self._host = ResourceHost(context, factory)
        self._push = DefinitionPush(self._store, self._host, self._links)
        self._router.bind(self._host, self._push, self._methods)
        self._status = StatusReport(
            self._host, self._store, self._push.refusals, self._site_of, self._links.state
        )
        self._services = ServiceCalls(context, state, self._driver, data_dir.services_file)
        self._nbd = NbdServer(self._host.exports, limits=limits)
        self._nbd_addresses: NbdAddresses | None = None
        self._control = ControlServer(self._methods, self._events)
        self._tasks: list[asyncio.Task[None]] = []
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """Set when a part that must run for ever has ended."""
        self._register()

    async def start(self, activated: Sequence[ActivatedSocket] = ()) -> None:
        """Serve; returns when every resource is open or has failed to.

        :param activated: further sockets for NBD, handed over by the service manager.
        :raises GeomirrorError: a socket cannot be had; what was started is stopped by `stop`.
        """
        self._host.on_started = self._service_started
        self._host.definition_of = self._definition_now
        self._router.on_link_up = self._link_up
        self._services.desk.circuits_max = self._host.circuits_max
        sockets = self._data_dir.prepare_socket_dir()
        self._status.nbd_socket = str(sockets / "nbd.sock")
        self._nbd.tls = load_nbd_tls(self._config.nbd, self._data_dir.root)
        path = self._status.nbd_socket
        self._nbd_addresses = await start_nbd(self._nbd, self._config.nbd, path, activated)
        self._nbd_tls_changed()
        self._driver.way_out = load_way_out(self._config.links, self._data_dir.root)
        self._set_peers()
        self._driver.websocket_tls = websocket_tls(self._config.node, self._data_dir.root)
        listen = self._config.node.listen or self._state.listen
        await self._links.start(listen, websocket_url(self._config.node))
        # After the links: a token that it makes can be used at once.
        await self._control.start(str(sockets / "control.sock"))
        await self._services.start()
        await self._open_resources()
        for name, work in self._services.upkeep().items():
            self._run_for_ever(name, work)
        self._run_for_ever("certificate", self._network.keep_certificate())
        self._run_for_ever("enforcement", self._enforce())
        self._run_for_ever("sightings", self._network.sightings.keep())
        self._run_for_ever("notifications", self._keep_notified())
        self._run_for_ever("tunnels", self._tunnels.keep())
        self.notifier.ready(self._summary())
        self._emit("node_started", {"version": __version__})

    async def stop(self) -> bool:
        """Say goodbye, seal, flush and close; bounded by `STOP_S_MAX`.

        :returns: False when time ran out; the caller ends the process, recovery does the rest.
        """
        self.notifier.stopping()
        try:
            await asyncio.wait_for(self._stop(), STOP_S_MAX)
        except TimeoutError:
            _log.error("stop_took_too_long", seconds=STOP_S_MAX)
            return False
        self._executor.shutdown(wait=False, cancel_futures=True)
        return True

    def reload(self) -> None:
        """Read the configuration again (SIGHUP); what cannot be used is said and left."""
        self.notifier.reloading(self._clock.now_ns())
        try:
            config = load_config(self._data_dir.config)
            tls = load_nbd_tls(config.nbd, self._data_dir.root)
            way_out = load_way_out(config.links, self._data_dir.root)
        except ConfigError as error:
            _log.error("configuration_not_reloaded", reason=str(error))
            self._emit("configuration_refused", {"reason": str(error)})
        else:
            changed = changed_keys(self._config, config)
            pending = [key for key in changed if key not in RELOADABLE]
            set_level(config.log.level)
            self._config, self._nbd.tls, self._driver.way_out = config, tls, way_out
            self._nbd_tls_changed()
            self._set_peers()
            fields = {"changed": changed, "restart_needed_for": pending}
            _log.info("configuration_reloaded", **fields)
            self._emit("configuration_reloaded", fields)
        self.notifier.ready(self._summary())

    # ---- parts

    def _nbd_tls_changed(self) -> None:
        if self._nbd_addresses is not None:
            warn_if_exposed(self._nbd_addresses, self._nbd.tls)
            self._status.nbd_tcp_base_uri = self._nbd_addresses.tcp_base_uri(self._nbd.tls)

    def _register(self) -> None:
        calls = ResourceCalls(
            host=self._host,
            store=self._store,
            push=self._push,
            links=self._links,
            known_nodes=lambda: [member.name for member in self._state.membership.active()],
            is_connected=self._router.is_up,
            describe=self._status.resource,
            disconnect=self._nbd.disconnect_export,
        )
        calls.register(self._methods)
        ResourceChanges(calls).register(self._methods)
        MarkCalls(calls).register(self._methods)
        VerifyCalls(calls).register(self._methods)
        views = ViewCalls(calls, self._status.addresses)
        views.register(self._methods)
        DrillCalls(calls, views, self._status.drills).register(self._methods)
        BranchCalls(calls, views).register(self._methods)
        RewindCalls(calls, self._nbd.connection_count).register(self._methods)
        HeldCalls(calls, views).register(self._methods)
        failover = FailoverCalls(self._host, self._store, self._links, self._router.is_up)
        failover.register(self._methods)
        self._volumes = VolumeChanges(calls)
        self._volumes.register(self._methods)
        self._promotion = PromotionCalls(calls, failover)
        self._promotion.register(self._methods)
        self._rejoiner = Rejoiner(calls)
        self._hearsay = Hearsay(calls, self._status)
        self._hearsay.register(self._methods)
        resolve = ResolveCalls(calls, self._promotion, self._rejoiner, self._hearsay)
        resolve.register(self._methods)
        self._register_network()
        self._services.register(self._methods)
        self._calls = calls
        self._methods.add("status", StatusRequest, self._show_status)

    def _register_network(self) -> None:
        state, context, methods = self._state, self._host.context, self._methods
        methods.note = AuditLog(context.data_dir, self._emit).note
        self._roster = Roster(state.membership)
        changed, ends_ns = self._members_changed, self._driver.certificate_ends_ns
        self._network = network = NetworkCalls(state, context, changed, ends_ns)
        network.paths_of = self._paths_of
        network.way_out = lambda: self._driver.way_out
        network.register(methods)
        LifecycleCalls(network, self._store, changed).register(methods)
        self._tunnels = TunnelService(state, context, self._config.tunnel, self._endpoints_of)
        TunnelCalls(self._tunnels, context.entropy).register(methods)
        LeaveCalls(network, self._store, changed, self._tunnels.down).register(methods)

    def _link_up(self, peer: str) -> None:
        self._network.link_up(peer)
        self._services.directory.link_up(peer)
        self._tunnels.link_up(peer)

    def _service_started(self, service: Service) -> None:
        self._rejoiner.watch(service)
        self._promotion.started(service)
        self._volumes.reconcile(service)
        self._router.service_started(service)

    async def _show_status(self, _caller: Caller, request: StatusRequest) -> Result:
        await self._hearsay.refresh(request.name)
        found = self._status.node(request.name)
        uptime_s = (self._clock.now_ns() - self._started_ns) / SECOND
        return {"version": __version__, "uptime_seconds": uptime_s, **found}

    async def _open_resources(self) -> None:
        opening = []
        for entry in self._store.entries():
            if entry.state == "active":
                opening.append(self._host.open(entry.definition))
            elif entry.state == "creating":
                # A crash came in between; nobody was told that it exists.
                directory = self._host.context.resource_dir(entry.definition.name)
                await asyncio.to_thread(remove_tree, directory)
                self._store.remove(entry.definition.resource_id)
            else:
                await self._calls.remove_local(entry, keep_data=entry.keep_data)
        await asyncio.gather(*opening)

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._nbd.stop()
        self._rejoiner.stop()
        await self._services.stop()
        await self._push.stop()
        await self._network.stop()
        await self._tunnels.stop()
        await self._host.close_all()
        await self._links.stop()
        await self._control.stop()

    def _run_for_ever(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        task.set_name(name)
        task.add_done_callback(self._task_ended)
        self._tasks.append(task)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self.failed.done():
            return
        error = task.exception() or RuntimeError(f"task {task.get_name()} ended")
        _log.error("task_failed", task=task.get_name(), exc_info=error)
        self.failed.set_result(error)

    async def _keep_notified(self) -> None:
        interval_s = min((self.notifier.watchdog_s or 60.0) / 3, 20.0)
        while True:
            self.notifier.watchdog()
            self.notifier.status(self._summary())
            await asyncio.sleep(interval_s)

    def _summary(self) -> str:
        served, failed = len(self._host.services), len(self._host.failures)
        text = f"{self._state.node}: {served} resources served"
        return f"{text}, {failed} failed" if failed else text

    def _definition_now(self, old: ResourceDefinition) -> ResourceDefinition:
        entry = self._store.find(old.name)
        return old if entry is None else entry.definition

    def _set_peers(self) -> None:
        peers, members = [], self._state.membership.active()
        for member in members:
            if member.name == self._state.node:
                continue
            peers.append(PeerAddress(member.name, self._paths_of(member)))
        self._links.set_peers(peers)
        rate = self._config.links.rate_bits_per_second
        for peer in peers:
            self._links.set_rate(peer.name, rate // 8 or None)
        self._push.members_changed({member.name for member in members})

    def _paths_of(self, member: Member) -> list[str]:
        return expand_paths(self._endpoints_of(member), self._config.links.proxy)

    def _endpoints_of(self, member: Member) -> Sequence[str]:
        override = self._config.peers.get(member.name)
        return override.endpoints if override and override.endpoints else member.endpoints

    def _members_changed(self) -> None:
        self._cut()
        context = self._host.context
        if context.name != self._state.node:
            context.name = self._state.node
            self._links.rename(self._state.node)
        self._set_peers()
        self._tunnels.members_changed()
        self._network.look_at_certificate()
        self._network.spread.changed()
        for kind, fields in self._roster.changes(self._state.membership):
            self._emit(kind, fields)
        self._emit("members_changed", {"nodes": len(self._state.membership.active())})

    def _joined(self, name: str) -> None:
        self._emit("node_joined", {"peer": name})
        self._members_changed()

    def _refused(self, source: str, error: GeomirrorError) -> None:
        untold = self._refusals.admit(self._clock.now_ns())
        if untold is not None:
            fields: dict[str, Any] = {"source": source, "reason": str(error), "untold": untold}
            self._emit("connection_refused", fields, is_foreign=True)

    async def _enforce(self) -> None:
        """Cut live links of revoked or expired nodes."""
        while True:
            await asyncio.sleep(ENFORCE_INTERVAL_S)
            self._cut()

    def _cut(self) -> None:
        for name in self._driver.enforce():
            self._emit("link_cut", {"peer": name, "reason": "revoked or expired"})

    def _site_of(self, name: str) -> str:
        member = self._state.membership.find(name)
        return member.site if member else ""

    def _emit(self, kind: str, fields: dict[str, Any], *, is_foreign: bool = False) -> None:
        time = rfc3339(self._clock.wall_ns())
        self._events.publish(kind, time, fields, is_foreign=is_foreign)
        _log.info(kind, **fields)
