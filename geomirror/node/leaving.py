"""The end of a node's time in its network: what is removed from this machine, and how a crash in
the middle is gone on from.

```
 node.leave ──▶ leaving.json ──▶ the authority is told ──▶ the daemon ends
                    │
 node leave ────────┴──▶ tunnels ──▶ resources ──▶ keys, records ──▶ leaving.json is removed
```
Once the file is there the daemon does not start any more and no other network can be joined; the
command may be given again until it is gone. What the operator wrote or kept stays: the
configuration, images in `kept/`, backing devices elsewhere, the audit log.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec

from geomirror.errors import StorageError
from geomirror.node.json_file import load_json
from geomirror.node.paths import DataDir, sync_directory, write_file_atomic
from geomirror.node.tunnel_host import TunnelHost
from geomirror.node.tunnel_store import TunnelStore, tag_of, take_away
from geomirror.tunnel.network_state_io import leaving_path, load_network

TREES = ("resources", "attachments", "tunnel", "authority", "identity", "network")
"""Directories below the data directory that a node makes, in the order of their removal: as long as
there are tunnels, the identity is needed to know which are ours."""
FILES = ("services.json", "resources.json")


class Leaving(msgspec.Struct, forbid_unknown_fields=True):
    """`leaving.json`"""

    network: str
    node: str
    node_id: str
    is_told: bool
    """The authority has signed that the node has left."""


def begin_leaving(data_dir: Path, leaving: Leaving) -> None:
    """From here on there is no way back. :raises StorageError: nothing has begun."""
    data = msgspec.json.format(msgspec.json.encode(leaving), indent=1)
    write_file_atomic(leaving_path(data_dir), data)


def load_leaving(data_dir: Path) -> Leaving | None:
    """How far it is; None: the node does not leave.

    :raises IntegrityError: the file is damaged.
    """
    path = leaving_path(data_dir)
    return load_json(path, Leaving, f"remove {data_dir} by hand")


def finish_leaving(data_dir: DataDir) -> list[str]:
    """Remove what is left of a node that leaves; the caller holds the daemon's lock. Blocking.

    :returns: what was removed, in words.
    :raises GeomirrorError: something could not be removed; it may be called again.
    """
    root = data_dir.root
    removed: list[str] = []
    if (root / "tunnel").exists():
        removed += _remove_tunnels(root)
    sockets = data_dir.socket_dir()
    paths = [root / name for name in (*TREES, *FILES)]
    paths += [sockets / "control.sock", sockets / "nbd.sock", data_dir.socket_pointer]
    for path in paths:
        if path.exists():
            _remove(path)
            removed.append(str(path))
    if sockets != root and sockets.is_dir() and not any(sockets.iterdir()):
        sockets.rmdir()
    leaving_path(root).unlink(missing_ok=True)
    sync_directory(root)
    return removed


def _remove_tunnels(root: Path) -> list[str]:
    if not (root / "network" / "network.json").exists():
        return []
    state = load_network(root)

    async def run() -> list[str]:
        host = TunnelHost(tag_of(state), lambda _: None)
        return await take_away(state, host, TunnelStore(root))

    return asyncio.run(run())


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise StorageError.from_os(error, operation="remove", path=str(path)) from error
