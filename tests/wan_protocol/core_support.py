"""A stage for the replica cores: real engines over simulated disks, real cores, a clock by hand.

```
 write ─▶ Primary ─ RunJob ─▶ run at once, or held ─▶ job_done
                  ─ SendMessage, SendFrame ─▶ encode, decode ─▶ Secondary     (or parked, or lost)
```
Nothing happens by itself: `pass_time` moves the clock from timer to timer, `settle` executes what
the cores decided. Beside it runs a model that is too simple to be wrong: the content at each cut.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from geomirror.environment import SeededEntropy
from geomirror.errors import GeomirrorError, JournalFullError
from geomirror.limits import KIB, SIMULATION, Limits
from geomirror.volume.engine import Engine, VolumeSpec
from geomirror.volume.open_epoch import EpochDraft
from geomirror.volume.superblock import GenerationRecord, PeerRecord
from geomirror.volume.volume_change import VolumeChange
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import Secondary
from geomirror.wan_protocol.sender import Sender
from tests.sim.disk import CrashStyle, SimStore
from tests.wan_protocol.core_machinery import (
    BLOCK,
    GENERATION,
    LOSE_ALL,
    PEER,
    PRIMARY,
    RESOURCE,
    SIZES,
    WALL_NS,
    Machinery,
    Node,
    Wire,
    noise,
    trim_of,
    write_of,
)

__all__ = [
    "BLOCK",
    "PEER",
    "PRIMARY",
    "SIZES",
    "Stage",
    "Wire",
    "different_blocks",
    "noise",
    "write_of",
]


class Stage(Machinery):
    """A primary and secondaries; links are up from the start unless told otherwise.

    :param first_sync: secondaries are blank, as at the creation of a resource.
    """

    def __init__(
        self,
        *peers: str,
        limits: Limits = SIMULATION,
        journal_bytes: int = 2048 * KIB,
        peer_journal_bytes: int = 2048 * KIB,
        first_sync: bool = False,
        is_connected: bool = True,
        sizes: dict[int, int] | None = None,
    ) -> None:
        super().__init__(list(peers) or [PEER])
        self.limits = limits
        self.sizes = SIZES if sizes is None else sizes
        self.journal_bytes = journal_bytes
        self.peer_journal_bytes = peer_journal_bytes
        self.first_sync = first_sync
        self.content = {i: bytearray(size) for i, size in self.sizes.items()}
        self.at_epoch: dict[int, dict[int, bytes]] = {0: self._frozen()}
        self._lives = 0
        for name in [PRIMARY, *self.peers]:
            self.nodes[name] = self._made(name)
        self.settle()
        if is_connected:
            for name in self.peers:
                self.link_up(name)

    # Parts by their names in a story.

    @property
    def secondary(self) -> Secondary:
        return self.mirror(self.peers[0])

    def mirror(self, name: str) -> Secondary:
        core = self.nodes[name].core
        assert isinstance(core, Secondary)
        return core

    def sender(self, name: str = PEER) -> Sender:
        return self.primary.senders[name]

    @property
    def west(self) -> Node:
        return self.nodes[self.peers[0]]

    # Machines.

    def _made(self, name: str) -> Node:
        is_primary = name == PRIMARY
        store = SimStore(f"stage/{name}")
        engine = self.create_engine(store, name)
        superblock = engine.superblock
        if not is_primary:
            superblock.data_state = "blank" if self.first_sync else "consistent"
        elif not self.first_sync:
            for peer in self.peers:
                superblock.peers[peer] = PeerRecord()
        job = engine.checkpoint_job()
        if job is not None:
            job.run()
            engine.complete_checkpoint(job)
        return Node(name, store, engine, self._core(name, engine))

    def create_engine(
        self,
        store: SimStore,
        name: str,
        *,
        generation: bytes | None = None,
        sizes: dict[int, int] | None = None,
    ) -> Engine:
        chain: list[GenerationRecord] = []
        if name == PRIMARY or generation is not None:
            chain = [GenerationRecord((generation or GENERATION).hex(), 1, by=name)]
        return Engine.create(
            store,
            self.limits,
            SeededEntropy(f"stage/{name}"),
            name="orders",
            resource_id=RESOURCE,
            volumes=[VolumeSpec(i, str(i), size) for i, size in (sizes or self.sizes).items()],
            journal_bytes=self.journal_bytes if name == PRIMARY else self.peer_journal_bytes,
            role="primary" if name == PRIMARY else "secondary",
            chain=chain,
            wall_ns=WALL_NS,
        )

    def _core(self, name: str, engine: Engine) -> Primary | Secondary:
        self._lives += 1
        core: Primary | Secondary
        if name == PRIMARY:
            self._watch_cuts(engine)
            core = Primary(
                engine,
                self.limits,
                incarnation=self._lives.to_bytes(16, "little"),
                peers=self.peers,
                now_ns=self.now_ns,
                wall_ns=self.wall_ns,
            )
        else:
            core = Secondary(engine, self.limits, primary=PRIMARY)
        core.handle_timer(self.now_ns)
        return core

    def _watch_cuts(self, engine: Engine) -> None:
        real = engine.cut

        def cut(wall_ns: int, *, is_mark: bool = False) -> EpochDraft | None:
            draft = real(wall_ns, is_mark=is_mark)
            if draft is not None:
                self.at_epoch[draft.number] = self._frozen()
            return draft

        engine.cut = cut  # type: ignore[method-assign]

    def crash(self, name: str, *, is_kill: bool = False, style: CrashStyle | None = None) -> None:
        """The process dies (`is_kill`), or the machine does; links to it are gone."""
        node = self.nodes[name]
        for peer in self.peers if name == PRIMARY else [name]:
            self.link_down(peer)
        node.is_alive = False
        node.waiting.clear()
        node.held.clear()
        node.store.faults.clear()
        node.store.crash(lose_nothing=is_kill, style=style)

    def start(self, name: str, *, is_connected: bool = True) -> None:
        """Bring a crashed machine back, from whatever is in its store."""
        node = self.nodes[name]
        assert not node.is_alive
        entropy = SeededEntropy(f"stage/{name}/{self._lives}")
        node.engine = Engine.open(
            node.store, self.limits, entropy, lambda volume: node.store.open("none")
        )
        if name == PRIMARY:
            self._take_recovered(node.engine)
        node.core = self._core(name, node.engine)
        node.is_alive = True
        self.settle()
        if is_connected:
            for peer in self.peers if name == PRIMARY else [name]:
                self.link_up(peer)

    def restart(self, name: str, *, is_kill: bool = False) -> None:
        """Crash and come back at once; without `is_kill` everything unsynced is lost."""
        self.crash(name, is_kill=is_kill, style=LOSE_ALL)
        self.start(name)

    def _take_recovered(self, engine: Engine) -> None:
        """A crash of the primary may lose what was not flushed; never what is sealed."""
        self.content = {
            volume: bytearray(engine.read(volume, 0, size))
            for volume, size in engine.sizes.now.items()
        }

    def snapshot(self, name: str) -> SimStore:
        """A copy of a machine's disk as it is now."""
        return copy.deepcopy(self.nodes[name].store)

    def restore(self, name: str, store: SimStore) -> None:
        """Put an older disk into the machine and start it."""
        self.crash(name, is_kill=True)
        self.nodes[name].store = copy.deepcopy(store)
        self.start(name)

    def replace(self, name: str, engine: Engine, store: SimStore) -> None:
        """Another installation answers under this name; its link is down."""
        self.link_down(name)
        node = self.nodes[name]
        self.nodes[name] = Node(name, store, engine, self._core(name, engine))
        assert node.name == name
        self.settle()

    # The client.

    def write(self, offset: int, data: bytes, volume: int = 0) -> None:
        self.submit([write_of(offset, data, volume)])

    def grow(self, volume: int, size: int, **backings: str) -> int:
        """Grow a volume or add one, as the node does; returns the epoch that will have it."""
        engine, old = self.primary.engine, len(self.content.get(volume, b""))
        change = VolumeChange(volume, str(volume), old, size, backings)
        engine.check_growth(change)
        job = engine.grow_job_for([change])
        if job is not None:
            job.run()
            self.primary.prepared(job)
        self.content.setdefault(volume, bytearray()).extend(bytes(size - old))
        try:
            number = self.primary.grow(change, self.now_ns, self.wall_ns)
        except GeomirrorError:
            del self.content[volume][old:]
            if not old:
                del self.content[volume]
            raise
        self.settle()
        return number

    def write_blocks(self, first: int, count: int, seed: int, volume: int = 0) -> None:
        """`count` adjacent blocks of noise in one batch."""
        self.write(first * BLOCK, noise(seed, count * BLOCK), volume)

    def trim(self, offset: int, length: int, volume: int = 0) -> None:
        self.submit([trim_of(offset, length, volume)])

    def submit(self, writes: Sequence[tuple[int, int, int, int, bytes | None]]) -> None:
        """One batch, *completed* when this returns. Raises what the core raises."""
        # The model comes first: the core may cut an epoch before its `write` returns.
        before = {volume: bytes(self.content[volume]) for _, volume, *_ in writes}
        for _, volume, offset, length, data in writes:
            self.content[volume][offset : offset + length] = data or bytes(length)
        try:
            self.primary.write(writes, self.now_ns, self.wall_ns)
        except GeomirrorError:
            for volume, old in before.items():
                self.content[volume][:] = old
            raise
        self.settle()

    def seal(self) -> int:
        """Seal what is open, without waiting for its age; returns the sealed epoch."""
        self.primary.seal_now(self.now_ns)
        self.settle()
        return self.primary.engine.sealed_epoch

    def write_epochs(self, count: int, *, blocks: int = 4, seed: int = 0) -> int:
        """`count` epochs of some blocks each, sealed one after the other.

        Time passes only while the writer is held back.
        """
        for at in range(count):
            first = (seed + at * blocks) % (512 - blocks)
            for _ in range(100):
                try:
                    self.write_blocks(first, blocks, seed * 1000 + at)
                    break
                except JournalFullError:
                    self.pass_time(20)
            self.seal()
        return self.primary.engine.sealed_epoch

    def overflow(self, name: str = PEER) -> None:
        """Write while the peer is away until the journal cannot hold its backlog any more."""
        self.link_down(name)
        for at in range(1, 1000):
            if self.sender(name).mode == "Bitmap":
                break
            try:
                self.write_blocks(at * 8 % 256, 8, seed=at)
            except JournalFullError:
                self.pass_time(50)
            if at % 2:
                self.seal()
        assert self.sender(name).mode == "Bitmap"
        self.pass_time(1500)

    # What must be true.

    def _frozen(self) -> dict[int, bytes]:
        return {volume: bytes(data) for volume, data in self.content.items()}

    def image(self, name: str = PEER) -> dict[int, bytes]:
        """What the backing devices of a secondary hold."""
        images = self.nodes[name].engine.images
        sizes = {index: image.size_bytes for index, image in images.items() if image.size_bytes}
        return {index: images[index].read(0, size) for index, size in sizes.items()}

    def check(self, name: str = PEER) -> int:
        """O1: the image is the primary's content at exactly the applied epoch; returns it."""
        engine = self.nodes[name].engine
        assert engine.superblock.data_state == "consistent"
        epoch = engine.applied_epoch
        expected = self.at_epoch[epoch]
        image = self.image(name)
        assert {v: len(d) for v, d in image.items()} == {v: len(d) for v, d in expected.items()}
        for volume, data in image.items():
            differing = different_blocks(data, expected[volume])
            assert not differing, f"{name} at epoch {epoch}: volume {volume}, {differing[:10]}"
        return epoch

    def check_in_sync(self, name: str = PEER) -> None:
        """Everything that was written is applied there, and both sides say so."""
        sender = self.sender(name)
        sealed = self.primary.engine.sealed_epoch
        assert self.primary.is_sealed
        assert self.at_epoch[sealed] == self._frozen()
        assert self.check(name) == sealed
        assert self.nodes[name].engine.sealed_hash == self.primary.engine.sealed_hash
        assert (sender.mode, sender.data_state) == ("Stream", "consistent")
        assert (sender.durable_epoch, sender.applied_epoch) == (sealed, sealed)


def different_blocks(left: bytes, right: bytes) -> list[int]:
    assert len(left) == len(right)
    starts = range(0, len(right), BLOCK)
    return [at // BLOCK for at in starts if left[at : at + BLOCK] != right[at : at + BLOCK]]
