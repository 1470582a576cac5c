"""A client's read of the primary: at once on the loop, and again as a job that takes its time."""

from __future__ import annotations

from geomirror.errors import StorageError
from geomirror.volume.engine_jobs import ReadJob
from tests.sim.node import MachineStoppedError, SimNode
from tests.sim.oracle import Oracle, OracleError
from tests.sim.world import MS

LENGTH_MAX = 60_000


def draw_volume(number: float, oracle: Oracle) -> int:
    """Mostly the first; `number` is in [0, 1)."""
    return 0 if number < 0.75 else 1 + int((number - 0.75) * 4 * (len(oracle.content) - 1))


class Reading:
    """One range, read twice: both have to give what was written last."""

    def __init__(self, node: SimNode, oracle: Oracle) -> None:
        chance = node.world.random
        self._node, self._oracle, self._life = node, oracle, node.life
        self._volume = draw_volume(chance.random(), oracle)
        size = len(oracle.content[self._volume])
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
        self._node.readings += 1
        self._position = len(self._oracle.log)
        world = self._node.world
        world.after(world.between(MS // 10, 400 * MS), lambda: self._end(job))

    def _end(self, job: ReadJob) -> None:
        node = self._node
        if node.life != self._life or not node.is_alive:
            return
        node.readings -= 1
        try:
            job.run()
        except StorageError:
            job.release()
            return
        except MachineStoppedError:
            node.setup.on_stopped(node)
            return
        job.release()
        place = (self._volume, self._offset, self._length)
        if not any(entry.touches(*place) for entry in self._oracle.log[self._position :]):
            self._compare(b"".join(job.buffers))

    def _compare(self, found: bytes) -> None:
        expected = self._oracle.content[self._volume][self._offset : self._offset + self._length]
        if found != expected:
            place = f"{self._length} bytes at {self._offset} of volume {self._volume}"
            raise OracleError(f"{self._node.name}: {place} read as something else")
