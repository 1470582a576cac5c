"""The daemon's export of one volume, and whether the one that is there again is still the same.

The connection is made first and the daemon is asked afterwards: if it was another daemon that
answered, the connection is dead, and nothing was sent over it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from geomirror.errors import (
    ChangedError,
    GeomirrorError,
    NotFoundError,
    RefusedError,
    UnreachableError,
)
from geomirror.nbd.client_io import NbdClient
from geomirror.node.control_client_io import ControlClient
from geomirror.node.error_json import error_from_object
from geomirror.node.paths import DataDir

_CALL_TIMEOUT_S = 15.0
_IDENTIFY_S_MAX = 60.0
"""Longer than a pass of a secondary that was running when we connected."""
_AGAIN = "detach it; attach it again to see what is there now"


@dataclass(frozen=True)
class Identity:
    """What a disk is: of another one nothing may be read or written under its name."""

    generation: str
    role: str
    size_bytes: int
    is_read_only: bool
    epoch: int | None
    """That a secondary's readers see; None at a primary."""


class Upstream:
    """Connects to one volume of this node's daemon, again and again."""

    def __init__(self, data_dir: DataDir, resource: str, volume: str) -> None:
        """:param volume: name, or empty for the first one; `find` fills it in."""
        self._control = ControlClient(data_dir)
        self.resource = resource
        self.volume = volume
        self.identity: Identity | None = None
        """Of the first connection."""

    @property
    def name(self) -> str:
        """`RES/VOLUME`."""
        return f"{self.resource}/{self.volume}"

    def find(self) -> str:
        """The volume's `nbd_uri` now.

        :raises NotFoundError: the node has no such resource or volume.
        :raises GeomirrorError: no daemon answers, or it does not serve the volume.
        """
        return self._uri(self._ask())

    async def connect(self) -> NbdClient:
        """A connection to the same disk as at the first time.

        :raises ChangedError: there is another one, or none any more: for good.
        :raises GeomirrorError: not yet.
        """
        uri = await asyncio.to_thread(self._find_again)
        client = await NbdClient.connect(uri, depth=1 << 16)
        is_kept = False
        try:
            async with asyncio.timeout(_IDENTIFY_S_MAX):
                found = await self._identify(client)
            if self.identity is None:
                self.identity = found
            self._compare(self.identity, found)
            is_kept = True
        except TimeoutError:
            raise UnreachableError(f'"{self.name}" is served, and does not answer reads') from None
        finally:
            if not is_kept:
                client.abort()
        return client

    def _ask(self) -> dict[str, Any]:
        answer = self._control.call("status", {"name": self.resource}, timeout_s=_CALL_TIMEOUT_S)
        found: dict[str, Any] = answer["resources"][0]
        return found

    def _find_again(self) -> str:
        try:
            return self.find()
        except NotFoundError as error:
            if self.identity is None:
                raise
            # The daemon knows its resources before it answers.
            raise ChangedError(f'"{self.name}" was deleted', hint="detach it") from error

    def _uri(self, resource: dict[str, Any]) -> str:
        names = [str(volume["name"]) for volume in resource["volumes"]]
        if not self.volume:
            self.volume = names[0]
        if self.volume not in names:
            raise NotFoundError(
                f'resource "{self.resource}" has no volume "{self.volume}"',
                hint=f"it has: {', '.join(names)}",
            )
        uri = resource["volumes"][names.index(self.volume)]["nbd_uri"]
        if uri is not None:
            return str(uri)
        if resource.get("error"):
            raise error_from_object(resource["error"])
        raise RefusedError(
            f'"{self.name}" is not served: {resource["state"]}',
            hint=f'see "geomirror status {self.resource}"',
        )

    async def _identify(self, client: NbdClient) -> Identity:
        # A read waits until a secondary's image stands still at the epoch of this connection.
        await client.read(0, 512)
        status = await asyncio.to_thread(self._ask)
        is_secondary = status["role"] == "secondary"
        return Identity(
            generation=str(status["generation"]),
            role=str(status["role"]),
            size_bytes=client.size_bytes,
            is_read_only=client.export.is_read_only,
            epoch=int(status["position"]["applied_epoch"]) if is_secondary else None,
        )

    def _compare(self, first: Identity, found: Identity) -> None:
        error: GeomirrorError | None = None
        if found.role != first.role:
            error = ChangedError(f'this node is {found.role} of "{self.name}" now', hint=_AGAIN)
        elif found.generation != first.generation:
            text = f'"{self.name}" has another history now: generation {found.generation}'
            error = ChangedError(text, hint=_AGAIN)
        elif found.size_bytes < first.size_bytes or found.is_read_only > first.is_read_only:
            error = ChangedError(f'"{self.name}" is smaller or read-only now', hint=_AGAIN)
        elif found.epoch != first.epoch:
            text = f'the copy of "{self.name}" here is at epoch {found.epoch}, not {first.epoch}'
            error = ChangedError(text, hint=_AGAIN)
        if error is not None:
            raise error
