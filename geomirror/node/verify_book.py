"""What verifies came to, and where one that runs is: a small file beside the resource's storage."""

from __future__ import annotations

import asyncio
from collections.abc import Container

import msgspec

from geomirror.errors import IntegrityError, StorageError
from geomirror.node.context import NodeContext
from geomirror.node.json_file import load_json
from geomirror.node.paths import write_file_atomic
from geomirror.wan_protocol.verify_schedule import Times

FILE = "verify.json"


class Blocks(msgspec.Struct, array_like=True):
    """A run of blocks of a volume."""

    volume: int
    first: int
    count: int


class Tally(msgspec.Struct):
    """What a verify found, so far or in all."""

    started_wall_ns: int
    heals: bool
    bytes_per_second: int
    total_blocks: int
    compared_blocks: int = 0
    different_blocks: int = 0
    healed_blocks: int = 0
    unhealed_blocks: int = 0
    different: list[Blocks] = msgspec.field(default_factory=list)
    epoch: int = 0
    result: str = ""
    """Empty unless it came to its end."""
    reason: str = ""
    ended_wall_ns: int | None = None
    is_scheduled: bool = False
    """Nobody asked for it: it was due."""


class Running(msgspec.Struct):
    """A verify that is not at its end: a restart goes on with it."""

    generation: str
    tally: Tally
    volume: int = 0
    block: int = 0
    noted_wall_ns: int = 0
    """When the position was noted."""


class PeerBook(msgspec.Struct):
    """All about one peer; unknown keys of a newer version are ignored."""

    running: Running | None = None
    last: Tally | None = None
    times: Times | None = None
    """None: the copy was not looked at yet."""


class _File(msgspec.Struct):
    peers: dict[str, PeerBook] = msgspec.field(default_factory=dict)


class VerifyBook:
    """The verifies of one resource, as its primary keeps them. On the event loop."""

    def __init__(self, resource: str, node: NodeContext) -> None:
        self._node = node
        self._path = node.resource_dir(resource) / FILE
        self._writing = asyncio.Lock()
        self.problem = ""
        """Why earlier results cannot be read."""
        self._file = self._read()

    def of(self, peer: str) -> PeerBook:
        """What is kept of a peer; changes are durable after `save`."""
        return self._file.peers.setdefault(peer, PeerBook())

    def find(self, peer: str) -> PeerBook | None:
        """The same, None if nothing was ever compared."""
        return self._file.peers.get(peer)

    def forget_others(self, peers: Container[str]) -> bool:
        """Drop what is no copy any more: one that is added again is another. Says if there was."""
        gone = [name for name in self._file.peers if name not in peers]
        for name in gone:
            del self._file.peers[name]
        return bool(gone)

    async def save(self) -> None:
        """Make it durable. :raises StorageError: the file is as before."""
        async with self._writing:
            data = msgspec.json.encode(self._file)
            await asyncio.get_running_loop().run_in_executor(
                self._node.executor, write_file_atomic, self._path, data
            )

    def _read(self) -> _File:
        try:
            return load_json(self._path, _File, "it holds only past results") or _File()
        except (StorageError, IntegrityError) as error:
            self.problem = f"{error.message}; {error.hint}" if error.hint else error.message
            return _File()
