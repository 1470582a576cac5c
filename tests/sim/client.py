"""The client of the primary, or of each: batches of writes, flushes, storms and calms."""

from __future__ import annotations

from collections.abc import Callable

from geomirror.errors import GeomirrorError, JournalFullError
from geomirror.volume.record import RecordType
from geomirror.wan_protocol.primary import Primary
from tests.sim.growth import Grower
from tests.sim.node import SimNode
from tests.sim.options import Options
from tests.sim.oracle import Entry, Oracle, OracleError
from tests.sim.reading import Reading, draw_volume
from tests.sim.sync_check import SyncCheck
from tests.sim.world import MS, SECOND, World

BATCHES = (1, 1, 1, 3, 8)
LENGTHS = (512, 4096, 4096, 4096, 4096, 8192, 1000, 20_000, 60_000)
ZERO_LENGTHS = (4096, 32_768, 100_000)
GAPS_NS = (5 * MS, 30 * MS, 200 * MS, SECOND)
QUIET_CHANCE = 0.6
HELD_NS_MAX = 40 * SECOND
"""A writer waits for the local disk only, so never for long while that disk is well."""


class Client:
    """Writes through whatever life of a primary is there."""

    def __init__(
        self,
        world: World,
        options: Options,
        sync: SyncCheck,
        writers: Callable[[], list[SimNode]],
    ) -> None:
        self.world = world
        self.options = options
        self.sync = sync
        self.grower = Grower(world)
        self.operations = 0
        self.is_ending = False
        self.held: dict[str, int] = {}
        """Nodes where writes are held back → since when."""
        self.is_storm = True
        self.is_quiet = False
        """A calm without faults: at its end nothing may lag."""
        self._writers = writers
        self.on_storm: Callable[[], None] = lambda: None
        """Called before each storm but the first."""
        self._serial = 0
        self._hot = 0

    def begin(self) -> None:
        """Start with a storm."""
        self._rage()
        self._work()

    def room(self, node: SimNode) -> None:
        """The primary says that held writers may try again, or it stopped."""
        self.held.pop(node.name, None)

    def flushed(self, token: object, error: GeomirrorError | None) -> None:
        """A flush was answered."""
        assert isinstance(token, tuple)
        primary, life, position, asked = token
        if error is None and life == primary.life:
            assert isinstance(primary.core, Primary)
            oracle = primary.oracle
            oracle.flushed = max(oracle.flushed, position)
            # One that was asked for while nobody was waited for does not wait, whatever came since.
            rules = primary.core.policy if asked.is_synchronous else asked
            self.sync.answered(oracle, position, primary.engine.sealed_epoch, rules)

    def _storm(self) -> None:
        if not self.is_ending:
            self.on_storm()
            self._rage()

    def _rage(self) -> None:
        self.is_storm = True
        self._hot = self.world.random.randrange(4)
        self.world.after(self.world.between(*self.options.storm_ns), self._calm)

    def _calm(self) -> None:
        if not self.is_ending:
            self.is_storm = False
            self.is_quiet = self.world.random.random() < QUIET_CHANCE
            self.world.after(self.world.between(*self.options.calm_ns), self._storm)

    def _work(self) -> None:
        chance, world = self.world.random, self.world
        if not self.is_ending:
            low, high = (MS, chance.choice(GAPS_NS)) if self.is_storm else (SECOND, 60 * SECOND)
            world.after(world.between(low, high), self._work)
        for primary in self._writers():
            if primary.is_alive and primary.core.fenced is None:
                self._work_at(primary)

    def _work_at(self, primary: SimNode) -> None:
        chance, world = self.world.random, self.world
        since_ns = self.held.get(primary.name)
        if since_ns is not None:
            if world.now_ns - since_ns > HELD_NS_MAX and not primary.is_ailing:
                raise OracleError(f"the writer is held back for {HELD_NS_MAX // SECOND} s")
            return
        burst = self.options.burst if self.is_storm else 2
        for _ in range(1 + int(chance.random() * burst)):
            if not self._write_batch(primary):
                return
        if self.options.growth_chance and chance.random() < self.options.growth_chance:
            self.grower.grow(primary)
        if chance.random() < 0.5:
            Reading(primary, primary.oracle).start()
        if chance.random() < 0.3:
            assert isinstance(primary.core, Primary)
            token = (primary, primary.life, len(primary.oracle.log), primary.core.policy)
            primary.call(lambda: primary.core.flush(token, primary.now_ns()))

    def _write_batch(self, primary: SimNode) -> bool:
        random = self.world.random.random
        entries = [
            self._draw_entry(primary.oracle) for _ in range(BATCHES[int(random() * len(BATCHES))])
        ]
        zero = int(RecordType.ZERO if random() < 0.5 else RecordType.TRIM)
        writes = [
            (
                zero if e.data is None else int(RecordType.WRITE),
                e.volume,
                e.offset,
                e.length,
                e.data,
            )
            for e in entries
        ]
        core = primary.core
        assert isinstance(core, Primary)
        is_refused = False

        def action() -> None:
            nonlocal is_refused
            try:
                core.write(writes, primary.now_ns(), primary.wall_ns())
            except GeomirrorError as error:
                is_refused = True
                if isinstance(error, JournalFullError):
                    self.held[primary.name] = self.world.now_ns

        primary.call(action)
        self.operations += len(entries)
        return not is_refused and primary.is_alive

    def _draw_entry(self, oracle: Oracle) -> Entry:
        random = self.world.random.random
        volume = draw_volume(random(), oracle)
        size = len(oracle.content[volume])
        length = min(LENGTHS[int(random() * len(LENGTHS))], size)
        offset = int(random() * (size - length + 1))
        if random() < 0.5:
            # Most of the writes of a storm fall into one quarter.
            offset = self._hot * size // 4 + offset % max(1, size // 4)
        if random() < 0.8:
            offset = offset // 4096 * 4096
        offset = min(offset, size - length)
        if random() < 0.12:
            length = min(ZERO_LENGTHS[int(random() * len(ZERO_LENGTHS))], size - offset)
            return Entry(volume, offset, length, None)
        self._serial += 1
        if random() < 0.3:
            return Entry(volume, offset, length, self.world.random.randbytes(length))
        pattern = self._serial.to_bytes(8, "little") + self.world.random.randbytes(8)
        return Entry(volume, offset, length, (pattern * (length // 16 + 1))[:length])
