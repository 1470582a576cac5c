"""`resources.json`: the definitions that this node keeps, and who has confirmed them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from geomirror.errors import NotFoundError, RefusedError, StorageError
from geomirror.node.json_file import load_json, require_format
from geomirror.node.paths import write_file_atomic
from geomirror.node.resource_definition import ResourceDefinition

FORMAT = 1
_RESTORE = "restore it; the resources' data below resources/ is not touched"


class ResourceEntry(msgspec.Struct, forbid_unknown_fields=True):
    """One resource as this node remembers it."""

    definition: ResourceDefinition
    state: Literal["creating", "active", "deleting"] = "creating"
    """`creating` is undone at the next start; `deleting` waits for secondaries to forget it."""
    is_forced: bool = False
    """`--force`: secondaries overwrite a backing that holds data."""
    keep_data: bool = False
    """While deleting: secondaries keep their images."""
    confirmed: dict[str, int] = {}
    """Primary only: member -> version of the definition that it has, 0 when it has forgotten."""
    leaving: dict[str, bool] = {}
    """Primary only: removed secondary that has not forgotten yet -> whether it keeps its image."""

    def is_known_to(self, peer: str) -> bool:
        """Whether a secondary has the resource, perhaps by an older version of its definition."""
        return peer in self.confirmed and peer not in self.leaving

    def pending_peers(self) -> list[str]:
        """Nodes that have not confirmed the newest state."""
        wanted = 0 if self.state == "deleting" else self.definition.version
        members = self.definition.secondaries
        return [n for n in members if self.confirmed.get(n, -1) != wanted] + sorted(self.leaving)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    resources: list[ResourceEntry]


class DefinitionStore:
    """All entries, by resource id; every change is durable before it returns."""

    def __init__(self, path: Path) -> None:
        """Load the file; an absent one is empty.

        :raises IntegrityError: it is not what this version writes.
        """
        self._path = path
        self._entries: dict[str, ResourceEntry] = {}
        found = load_json(path, _File, _RESTORE)
        if found is None:
            return
        require_format(path, found.format, FORMAT)
        self._entries = {entry.definition.resource_id: entry for entry in found.resources}

    def entries(self) -> list[ResourceEntry]:
        """All entries, by name."""
        return sorted(self._entries.values(), key=lambda entry: entry.definition.name)

    def find(self, name: str) -> ResourceEntry | None:
        """The live (not deleting) entry of a name."""
        for entry in self._entries.values():
            if entry.definition.name == name and entry.state != "deleting":
                return entry
        return None

    def get(self, name: str) -> ResourceEntry:
        """The live entry of a name.

        :raises NotFoundError: there is none on this node.
        """
        entry = self.find(name)
        if entry is None:
            raise NotFoundError(
                f'no resource "{name}" on this node', hint='see "geomirror resource list"'
            )
        return entry

    def by_id(self, resource_id: str) -> ResourceEntry | None:
        """The entry of an id, in any state."""
        return self._entries.get(resource_id)

    def asked_by(self, peer: str | None, resource_id: str) -> ResourceDefinition:
        """The definition of a live resource that a member asks this node about.

        :param peer: who asks; None: this machine's operator.
        :raises NotFoundError: there is none on this node.
        :raises RefusedError: the peer is no member of it.
        """
        entry = self.by_id(resource_id)
        if entry is None or entry.state == "deleting":
            raise NotFoundError("no such resource on this node")
        if peer is not None and peer not in entry.definition.members:
            raise RefusedError(f'node "{peer}" is no member of "{entry.definition.name}"')
        return entry.definition

    def put(self, entry: ResourceEntry) -> None:
        """Add or replace an entry; durable at return.

        :raises StorageError: nothing changed, neither on disk nor here.
        """
        identity = entry.definition.resource_id
        before = self._entries.get(identity)
        self._entries[identity] = entry
        try:
            self.save()
        except StorageError:
            if before is None:
                del self._entries[identity]
            else:
                self._entries[identity] = before
            raise

    def remove(self, resource_id: str) -> None:
        """Forget an entry; durable at return. :raises StorageError: not durable."""
        self._entries.pop(resource_id, None)
        self.save()

    def save(self) -> None:
        """Write everything; needed after an entry was changed in place."""
        file = _File(FORMAT, self.entries())
        write_file_atomic(self._path, msgspec.json.format(msgspec.json.encode(file), indent=1))
