"""A client's read of the primary: at once on the loop, and again as a job that takes its time."""

from __future__ import annotations

from geomirror.errors import StorageError
from geomirror.volume.engine_jobs import ReadJob
from tests.sim.node import MachineStoppedError, SimNode
from tests.sim.oracle import Entry, Oracle, OracleError
from tests.sim.world import MS

LENGTH_MAX = 60_000


class Reading:
    """One range, read twice: both have to give what was written last."""

    def __init__(self, node: SimNode, oracle: Oracle) -> None:
        chance = node.world.random
        self._node, self._oracle, self._life = node, oracle, node.life
        self._volume = 0 if chance.random() < 0.75 else 1
        size = oracle.sizes[self._volume]
        self._offset = int(chance.random() * size)
        self._length = 1 + int(chance.random() * min(LENGTH_MAX, size - self._offset - 1))
        self._position = 0

    def start(self) -> None:
        """Read now, and begin to read later."""
        self._node.call(self._begin)

    def _begin(self) -> None:
        engine = self._node.engine
        place = (self._volume, self._offset, self._length)
        try:
            self._compare(engine.read(*place))
        except StorageError:
            return  # The client gets EIO.
        job = engine.read_job(*place)
        self._position = len(self._oracle.log)
        world = self._node.world
        world.after(world.between(MS // 10, 400 * MS), lambda: self._end(job))

    def _end(self, job: ReadJob) -> None:
        node = self._node
        if node.life != self._life or not node.is_alive:
            return
        try:
            job.run()
        except StorageError:
            job.release()
            return
        except MachineStoppedError:
            node.setup.on_stopped(node)
            return
        job.release()
        if not any(self._touches(entry) for entry in self._oracle.log[self._position :]):
            self._compare(b"".join(job.buffers))

    def _touches(self, entry: Entry) -> bool:
        end = self._offset + self._length
        is_apart = entry.offset >= end or entry.offset + entry.length <= self._offset
        return entry.volume == self._volume and not is_apart

    def _compare(self, found: bytes) -> None:
        expected = self._oracle.content[self._volume][self._offset : self._offset + self._length]
        if found != expected:
            place = f"{self._length} bytes at {self._offset} of volume {self._volume}"
            raise OracleError(f"{self._node.name}: {place} read as something else")
