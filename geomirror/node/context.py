"""What a node lends to each of its resources."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomirror.environment import Clock, Entropy
from geomirror.limits import Limits

if TYPE_CHECKING:
    from geomirror.wan_protocol.streams_io import PeerLinks


@dataclass
class NodeContext:
    """One node as its resources see it."""

    name: str
    site: str
    data_dir: Path
    """Absolute; a resource's state lies in `data_dir / "resources" / NAME`."""
    limits: Limits
    clock: Clock
    entropy: Entropy
    links: PeerLinks
    emit: Callable[[str, dict[str, Any]], None]
    """Publish an event: its kind and its plain JSON fields. Callable on the event loop only."""
    executor: Executor
    """Worker threads for blocking jobs."""
    is_single_writer: bool = False
    """One connection at a time to each volume of a primary."""
    is_read_only: bool = False
    """Volumes of primaries refuse writes."""

    def resource_dir(self, name: str) -> Path:
        """Directory of a resource on this node."""
        return self.data_dir / "resources" / name
