"""What a connection asks of its server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geomirror.limits import Limits
from geomirror.nbd.protocol import Export

if TYPE_CHECKING:
    from geomirror.nbd.connection_io import NbdConnection


class Registry:
    """What a connection needs of its server; `NbdServer` implements it."""

    limits: Limits

    def resolve(self, name: str) -> Export | None:
        """The export of a name."""
        raise NotImplementedError

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of all exports."""
        raise NotImplementedError

    def admit(self, connection: NbdConnection, export: Export) -> None:
        """Count a connection against its export's limit, or raise `RefusedError`."""
        raise NotImplementedError

    def connected(self, connection: NbdConnection) -> bool:
        """A client connected; False to turn it away."""
        raise NotImplementedError

    def disconnected(self, connection: NbdConnection, error: Exception | None) -> None:
        """A connection is over, whatever it was."""
        raise NotImplementedError
