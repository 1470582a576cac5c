"""The documents of `status`, with what only the node knows: addresses, sites, links."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from geomirror.errors import NotFoundError
from geomirror.node.definition_store import DefinitionStore, ResourceEntry
from geomirror.node.drill_book import DrillBook
from geomirror.node.error_json import error_object
from geomirror.node.resource_host import ResourceHost
from geomirror.wan_protocol.link_events import LinkStatus


class StatusReport:
    """Assembles a node's status; every call is cheap and on the event loop."""

    def __init__(
        self,
        host: ResourceHost,
        store: DefinitionStore,
        refusals: dict[tuple[str, str], str],
        site_of: Callable[[str], str],
        link_of: Callable[[str], LinkStatus],
    ) -> None:
        self._host = host
        self._store = store
        self._refusals = refusals
        self._site_of = site_of
        self._link_of = link_of
        self.drills = DrillBook(host.context)
        self.heard_drills: dict[tuple[str, str], dict[str, Any]] = {}
        """(resource id, node) → `last_drill` there; see `hearsay`."""
        self.nbd_socket = ""
        self.nbd_tcp_base_uri: str | None = None

    def node(self, name: str | None = None) -> dict[str, Any]:
        """The whole document, or that of one resource.

        :raises NotFoundError: no such resource on this node.
        """
        entries = [entry for entry in self._store.entries() if entry.state != "deleting"]
        if name is not None:
            entries = [entry for entry in entries if entry.definition.name == name]
            if not entries:
                raise NotFoundError(
                    f'no resource "{name}" on this node', hint='see "geomirror resource list"'
                )
        context = self._host.context
        resources = [self.resource(entry.definition.name) for entry in entries]
        return {"node": context.name, "site": context.site, "resources": resources}

    def resource(self, name: str) -> dict[str, Any]:
        """The object of one resource."""
        entry = self._store.get(name)
        service = self._host.services.get(name)
        if service is None:
            drills: dict[str, Any] = {"last_drill": self._last_drill(entry), "drills_elsewhere": []}
            return {**self._not_served(entry), **drills}
        found = service.status()
        found["last_drill"] = self._last_drill(entry)
        found["drills_elsewhere"] = (
            self._drills_elsewhere(entry) if service.role == "primary" else []
        )
        for volume in found["volumes"]:
            volume.update(self.addresses(name, str(volume["name"])))
        here = self._host.context.name
        for peer in found["peers"]:
            link = self._link_of(peer["node"])
            peer["reason"] = peer["reason"] or link.trouble
            peer["site"] = self._site_of(peer["node"])
            peer["is_member"] = bool(peer["site"])
            peer["path"] = [here, peer["node"]] if link.is_established else []
            peer["pending"] = self._refusals.get((name, peer["node"]))
            if entry.definition.primary == here and not entry.is_known_to(peer["node"]):
                peer["state"] = "Pending"
        found["error"] = found.get("error")
        return found

    def _last_drill(self, entry: ResourceEntry) -> dict[str, Any] | None:
        return self.drills.last(entry.definition.name, entry.definition.resource_id)

    def _drills_elsewhere(self, entry: ResourceEntry) -> list[dict[str, Any]]:
        definition = entry.definition
        found = [
            (n, self.heard_drills.get((definition.resource_id, n))) for n in definition.members
        ]
        return [{"node": node, **last} for node, last in found if last is not None]

    def _not_served(self, entry: ResourceEntry) -> dict[str, Any]:
        definition, here = entry.definition, self._host.context.name
        failure = self._host.failures.get(definition.name)
        volumes = [
            {"name": volume.name, "size_bytes": volume.size_bytes, "nbd_uri": None}
            for volume in definition.volumes
        ]
        return {
            "name": definition.name,
            "generation": None,
            "role": "primary" if definition.primary == here else "secondary",
            "state": "failed" if failure else "opening",
            "journal": None,
            "volumes": volumes,
            "position": None,
            "peers": [],
            "error": error_object(failure) if failure else None,
        }

    def addresses(self, resource: str, volume: str) -> dict[str, str]:
        """URIs of a volume: `nbd_uri`, and `nbd_tcp_uri` where TCP is configured."""
        # "@" stands between a resource and its view, and may stand in a path (RFC 3986, pchar).
        path = f"{quote(resource, safe='@')}/{quote(volume)}"
        socket = quote(self.nbd_socket, safe="/")
        found = {"nbd_uri": f"nbd+unix:///{path}?socket={socket}"}
        if self.nbd_tcp_base_uri:
            found["nbd_tcp_uri"] = f"{self.nbd_tcp_base_uri}/{path}"
        return found
