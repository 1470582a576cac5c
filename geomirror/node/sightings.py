"""When this node was last linked with each of the others, and how long their certificates last.

For people only, so it survives a restart but is not worth an fsync a second: it is stored each ten
minutes and at the end, and a file that cannot be read is begun anew.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from geomirror.errors import GeomirrorError
from geomirror.node.context import NodeContext
from geomirror.node.json_file import load_json, require_format
from geomirror.node.network_view import network_object, node_object
from geomirror.node.paths import write_file_atomic
from geomirror.node.rfc3339 import rfc3339
from geomirror.tunnel.certificates import to_ns
from geomirror.tunnel.network_state_io import NetworkState, load_network

_log = structlog.get_logger(component="network")

FORMAT = 1
LOOK_S = 60.0
"""Between two looks at the links."""
LOOKS_PER_SAVE = 10


class Sighting(msgspec.Struct, forbid_unknown_fields=True):
    """Of one node. Unix ns."""

    seen_ns: int
    certificate_ends_ns: int | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    nodes: dict[str, Sighting]


def sightings_path(data_dir: Path) -> Path:
    """`network/seen.json`"""
    return data_dir / "network" / "seen.json"


def load_sightings(path: Path) -> dict[str, Sighting]:
    """Node id → sighting; empty where there is no file, or none that can be read."""
    try:
        found = load_json(path, _File, "remove it")
        if found is None:
            return {}
        require_format(path, found.format, FORMAT)
    except GeomirrorError as error:
        _log.warning("sightings_lost", reason=str(error))
        return {}
    return found.nodes


def listed_nodes(state: NetworkState, seen: dict[str, Sighting]) -> list[dict[str, Any]]:
    """Every member, as `node list` and `network show` have it."""
    nodes = []
    for member in state.membership.active():
        found = node_object(state, member)
        found["is_self"] = member.node_id == state.identity.node_id
        sighting = seen.get(member.node_id)
        ends_ns = sighting.certificate_ends_ns if sighting else None
        if found["is_self"]:
            ends_ns = to_ns(state.certificate.not_valid_after_utc)
        found["certificate_expires_at"] = rfc3339(ends_ns) if ends_ns else None
        is_seen = sighting is not None and not found["is_self"]
        found["last_seen_at"] = rfc3339(sighting.seen_ns) if sighting and is_seen else None
        nodes.append(found)
    return nodes


def shown_network(data_dir: Path) -> dict[str, Any]:
    """`network show` where no daemon runs.

    :raises GeomirrorError: see `load_network`.
    """
    state = load_network(data_dir)
    nodes = listed_nodes(state, load_sightings(sightings_path(data_dir)))
    return {**network_object(state), "nodes": nodes}


class Sightings:
    """On the event loop; files on a worker thread.

    :param certificate_ends_ns: of the newest certificate that a node id has shown.
    """

    def __init__(
        self,
        state: NetworkState,
        context: NodeContext,
        certificate_ends_ns: Callable[[str], int | None],
    ) -> None:
        self._state = state
        self._context = context
        self._certificate_ends_ns = certificate_ends_ns
        self._seen: dict[str, Sighting] | None = None

    def look(self) -> None:
        """Remember who is linked now."""
        state, seen = self._state, self._loaded()
        wall_ns = self._context.clock.wall_ns()
        for member in state.membership.active():
            is_other = member.node_id != state.identity.node_id
            if is_other and self._context.links.state(member.name).is_established:
                known = seen.get(member.node_id)
                ends_ns = self._certificate_ends_ns(member.node_id)
                ends_ns = ends_ns or (known.certificate_ends_ns if known else None)
                seen[member.node_id] = Sighting(wall_ns, ends_ns)

    def nodes(self) -> list[dict[str, Any]]:
        """Every member, with when it was seen."""
        return listed_nodes(self._state, self._loaded())

    async def keep(self) -> None:
        """Look and store, for ever."""
        looks = 0
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()
            looks += 1
            if looks % LOOKS_PER_SAVE == 0:
                await self._save()

    async def stop(self) -> None:
        """Store what was seen."""
        if self._seen is not None:
            self.look()
            await self._save()

    def _loaded(self) -> dict[str, Sighting]:
        if self._seen is None:
            self._seen = load_sightings(sightings_path(self._state.data_dir))
        return self._seen

    async def _save(self) -> None:
        members = {member.node_id for member in self._state.membership.active()}
        nodes = {key: value for key, value in self._loaded().items() if key in members}
        data = msgspec.json.format(msgspec.json.encode(_File(FORMAT, nodes)), indent=1)
        # A full disk takes nothing but the times.
        with contextlib.suppress(GeomirrorError):
            path = sightings_path(self._state.data_dir)
            await asyncio.to_thread(write_file_atomic, path, data)
