"""What must be true: the front end's log, and every image and position checked against it.

S(p) is the content after the first p operations of the log. O1: a mirror equals S(p) for exactly
the epoch it reports. O2: that never falls. O3: it is at least what was last reported durable. O4:
local recovery is at least the last flush reply and at least every mirror. O5: undo gives the blocks
of an earlier epoch. O7 is the runner's, O8 is in `sync_check`, O9 in `status_check`.

An `Oracle` is one history. A promotion forks it: the new generation goes on from an epoch of the
old one, which may go on as well. `placing` knows which node is on which.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from geomirror.volume.journal import Write

BLOCK = 4096
ENDLESS = 1 << 62


class OracleError(AssertionError):
    """A promise was broken."""


@dataclass(slots=True)
class Entry:
    """One write (data) or zeroing (None) as the client sees it."""

    volume: int
    offset: int
    length: int
    data: bytes | None

    def apply(self, content: dict[int, bytearray]) -> bytes:
        """Change the content; returns what was there."""
        target = content[self.volume]
        end = self.offset + self.length
        old = bytes(target[self.offset : end])
        target[self.offset : end] = bytes(self.length) if self.data is None else self.data
        return old

    def revert(self, content: dict[int, bytearray], old: bytes) -> None:
        """Undo `apply`."""
        content[self.volume][self.offset : self.offset + self.length] = old

    def touches(self, volume: int, offset: int, length: int) -> bool:
        """Whether it changes a part of a range."""
        is_apart = self.offset >= offset + length or self.offset + self.length <= offset
        return self.volume == volume and not is_apart

    def blocks(self) -> range:
        """The blocks that it changes."""
        return range(self.offset // BLOCK, (self.offset + self.length + BLOCK - 1) // BLOCK)


@dataclass(slots=True)
class Growth:
    """A volume got a new size, from 0 when it was added."""

    volume: int
    old_size: int
    size: int

    def apply(self, content: dict[int, bytearray]) -> bytes:
        """Change the content."""
        content.setdefault(self.volume, bytearray()).extend(bytes(self.size - self.old_size))
        return b""

    def revert(self, content: dict[int, bytearray], _old: bytes) -> None:
        """Undo `apply`."""
        del content[self.volume][self.old_size :]
        if not self.old_size:
            del content[self.volume]

    def touches(self, _volume: int, _offset: int, _length: int) -> bool:
        """Nothing that was there."""
        return False

    def blocks(self) -> range:
        """The blocks that it changes."""
        return range(self.old_size // BLOCK, (self.size + BLOCK - 1) // BLOCK)


@dataclass
class Mirror:
    """What is known of one secondary."""

    content: dict[int, bytearray]
    at_epoch: int = 0
    """Of `content`, and the highest that was ever applied."""
    durable_epoch: int = 0
    line: Oracle | None = None
    """The history that these epochs are of; None: the first one."""


@dataclass
class History:
    """What one block held after the epochs that changed it."""

    epochs: list[int] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)


@dataclass
class Oracle:
    """The log of one resource and all checks."""

    sizes: dict[int, int]
    """At the beginning."""
    log: list[Entry | Growth] = field(default_factory=list)
    undo: list[bytes] = field(default_factory=list)
    flushed: int = 0
    epoch_prefix: dict[int, int] = field(default_factory=dict)
    epoch_sizes: dict[int, dict[int, int]] = field(default_factory=dict)
    """Sizes of the volumes after an epoch."""
    epoch_hash: dict[int, bytes] = field(default_factory=dict)
    changes: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Blocks that an epoch changes."""
    history: dict[tuple[int, int], History] = field(default_factory=dict)
    sealed_epoch: int = 0
    mirrors: dict[str, Mirror] = field(default_factory=dict)
    rotten: dict[str, set[tuple[int, int]]] = field(default_factory=dict)
    """Blocks (volume, number) whose image rotted at a node: nothing is said of them until the end,
    when all have to be healed."""
    checks: int = 0
    undo_checks: int = 0
    generation: str = ""
    """Identity in hex; of the first one it does not matter."""
    parent: Oracle | None = None
    base_epoch: int = 0
    """The last epoch that it shares with its parent."""
    label: str = ""
    """Tells a line of a generation from the one that it forked from; "" for the first one."""

    @property
    def key(self) -> str:
        """One for each history."""
        return self.label or self.generation

    def __post_init__(self) -> None:
        self.content = self.blank()
        self.epoch_prefix[0] = 0
        self.epoch_sizes[0] = dict(self.sizes)
        self.touched: set[tuple[int, int]] = set()

    def fork(self, generation: str, epoch: int) -> Oracle:
        """The history of another generation, which begins after an epoch of this one."""
        if epoch > self.sealed_epoch:
            raise OracleError(f"a generation begins at epoch {epoch}, which was never sealed")
        prefix = self.epoch_prefix[epoch]
        other = Oracle(
            self.sizes,
            log=self.log[:prefix],
            undo=self.undo[:prefix],
            flushed=min(self.flushed, prefix),
            epoch_prefix={e: p for e, p in self.epoch_prefix.items() if e <= epoch},
            epoch_sizes={e: sizes for e, sizes in self.epoch_sizes.items() if e <= epoch},
            epoch_hash={e: known for e, known in self.epoch_hash.items() if e <= epoch},
            changes={e: keys for e, keys in self.changes.items() if e <= epoch},
            sealed_epoch=epoch,
            mirrors=self.mirrors,
            rotten=self.rotten,
            generation=generation,
            parent=self,
            base_epoch=epoch,
        )
        for key, known in self.history.items():
            count = bisect_right(known.epochs, epoch)
            if count:
                other.history[key] = History(known.epochs[:count], known.contents[:count])
        other.content = {volume: bytearray(content) for volume, content in self.content.items()}
        for at in range(len(self.log) - 1, prefix - 1, -1):
            self.log[at].revert(other.content, self.undo[at])
        return other

    def twin(self, label: str) -> Oracle:
        """The same history, which may go on in another way: a machine's disk as it is now. What is
        in no epoch yet is in doubt, as after a crash."""
        other = Oracle(
            self.sizes,
            log=list(self.log),
            undo=list(self.undo),
            flushed=self.flushed,
            epoch_prefix=dict(self.epoch_prefix),
            epoch_sizes=dict(self.epoch_sizes),
            epoch_hash=dict(self.epoch_hash),
            changes=dict(self.changes),
            history={k: History([*h.epochs], [*h.contents]) for k, h in self.history.items()},
            sealed_epoch=self.sealed_epoch,
            mirrors=self.mirrors,
            rotten=self.rotten,
            generation=self.generation,
            parent=self,
            base_epoch=self.sealed_epoch,
            label=label,
        )
        other.content = {volume: bytearray(content) for volume, content in self.content.items()}
        other.touched = set(self.touched)
        return other

    def common_epoch(self, other: Oracle) -> int:
        """The last epoch that two histories share."""
        ends = {id(line): end for line, end in self._left_at()}
        return next(min(end, ends[id(o)]) for o, end in other._left_at() if id(o) in ends)

    def ancestry(self) -> Iterator[Oracle]:
        """This history and those before it."""
        return (line for line, _ in self._left_at())

    def _left_at(self) -> Iterator[tuple[Oracle, int]]:
        """This history and those before it, each with the epoch at which it is left."""
        line: Oracle | None = self
        end = ENDLESS
        while line is not None:
            yield line, end
            line, end = line.parent, line.base_epoch

    def content_at(self, epoch: int) -> dict[int, bytes]:
        """All volumes after an epoch."""
        found: dict[int, bytes] = {}
        for volume, size in self.epoch_sizes[epoch].items():
            blocks = range(-(-size // BLOCK))
            whole = b"".join(self.block_at(volume, block, epoch) for block in blocks)
            found[volume] = whole[:size]
        return found

    def blank(self) -> dict[int, bytearray]:
        """All volumes as zeros."""
        return {volume: bytearray(size) for volume, size in self.sizes.items()}

    def check_healing(self, name: str, writes: Sequence[Write]) -> None:
        """V3: what a verify writes again at the primary is what every reader finds there."""
        rotten = self.rotten.get(name, ())
        for _, volume, offset, length, data in writes:
            content = self.content[volume][offset : offset + length]
            is_same = content == (bytes(length) if data is None else data)
            if not is_same and (volume, offset // BLOCK) not in rotten:
                where = f"block {offset // BLOCK} of volume {volume}"
                raise OracleError(f"V3: {name} heals {where} with something else")
        self.checks += 1

    def add(self, entry: Entry | Growth) -> None:
        """An operation was handed to the primary."""
        self.undo.append(entry.apply(self.content))
        self.log.append(entry)
        for block in entry.blocks():
            self.touched.add((entry.volume, block))

    def forget_last(self, count: int) -> None:
        """The last operations were refused: they never happened."""
        for _ in range(count):
            self.log.pop().revert(self.content, self.undo.pop())

    def cut(self, epoch: int) -> None:
        """The primary ended an epoch after the last operation."""
        self.epoch_prefix[epoch] = len(self.log)
        self.epoch_sizes[epoch] = {v: len(content) for v, content in self.content.items()}
        # Of a growth that was refused nothing is there.
        sizes = self.epoch_sizes[epoch]
        changed = sorted(key for key in self.touched if key[1] * BLOCK < sizes.get(key[0], 0))
        self.touched.clear()
        self.changes[epoch] = changed
        for volume, block in changed:
            history = self.history.get((volume, block))
            if history is None:
                history = self.history[volume, block] = History()
            history.epochs.append(epoch)
            content = bytes(self.content[volume][block * BLOCK : (block + 1) * BLOCK])
            history.contents.append(content)

    def sealed(self, epoch: int, chain_hash: bytes) -> None:
        """The primary says that an epoch is sealed: it must never be another one again."""
        known = self.epoch_hash.setdefault(epoch, chain_hash)
        if known != chain_hash:
            raise OracleError(f"epoch {epoch} was sealed with another hash before")
        self.sealed_epoch = max(self.sealed_epoch, epoch)

    def recovered(self, content: dict[int, bytes], sealed_epoch: int) -> int:
        """O4: the primary came back with this content; returns how many operations were lost."""
        if sealed_epoch < self.sealed_epoch:
            raise OracleError(f"recovered epoch {sealed_epoch}, {self.sealed_epoch} was sealed")
        least = max(self.flushed, self.epoch_prefix[self.sealed_epoch])
        total = len(self.log)
        while content != self.content:
            if len(self.log) <= least:
                raise OracleError(f"recovered content is no prefix in [{least}, {total}]")
            self.forget_last(1)
        for epoch in sorted((e for e, p in self.epoch_prefix.items() if p > len(self.log))):
            if epoch <= sealed_epoch:
                raise OracleError(f"epoch {epoch} was recovered without its operations")
        for epoch in sorted((e for e in self.epoch_prefix if e > sealed_epoch), reverse=True):
            self._forget_epoch(epoch)
        start = self.epoch_prefix[sealed_epoch]
        self.touched = {(e.volume, b) for e in self.log[start:] for b in e.blocks()}
        self.checks += 1
        return total - len(self.log)

    def _forget_epoch(self, epoch: int) -> None:
        """It was cut but never sealed: another one will have its number."""
        del self.epoch_prefix[epoch], self.epoch_sizes[epoch]
        for key in self.changes.pop(epoch):
            history = self.history[key]
            assert history.epochs.pop() == epoch
            history.contents.pop()

    def block_at(self, volume: int, block: int, epoch: int) -> bytes:
        """What a block holds after an epoch; a short last one is padded."""
        history = self.history.get((volume, block))
        at = bisect_right(history.epochs, epoch) if history is not None else 0
        content = history.contents[at - 1] if history is not None and at else b""
        return content.ljust(BLOCK, b"\0")

    def undone(self, name: str, volume: int, block: int, epoch: int, content: bytes) -> None:
        """O5: undo at a node says that a block held this after an epoch."""
        self.undo_checks += 1
        if (volume, block) in self.rotten.get(name, ()):
            return
        if content.ljust(BLOCK, b"\0") != self.block_at(volume, block, epoch):
            raise OracleError(
                f"{name}: undo gives another block {block} of volume {volume} at epoch {epoch}"
            )

    def check_old_sizes(self, name: str, found: dict[int, int], epoch: int) -> None:
        """O5: volumes have these sizes in a view of an epoch."""
        if found != self.epoch_sizes[epoch]:
            raise OracleError(
                f"{name}: at epoch {epoch} volumes have {self.epoch_sizes[epoch]}, not {found}"
            )

    def reported_durable(self, name: str, epoch: int, chain_hash: bytes) -> None:
        """A mirror says that an epoch is durable there."""
        if epoch > self.sealed_epoch:
            raise OracleError(f"{name} has epoch {epoch}, only {self.sealed_epoch} is sealed")
        if epoch and self.epoch_hash.get(epoch) not in (None, chain_hash):
            raise OracleError(f"{name} has another hash at epoch {epoch}")
        mirror = self.mirrors[name]
        mirror.durable_epoch = max(mirror.durable_epoch, epoch)

    def restarted(self, name: str, durable_epoch: int) -> None:
        """O3: a mirror came back at this position."""
        known = self.mirrors[name].durable_epoch
        if durable_epoch < known:
            raise OracleError(f"{name} came back at epoch {durable_epoch}, reported {known}")

    def restored(self, name: str) -> None:
        """An old state of a mirror's disk was put back: what it reported counts no more."""
        self.mirrors[name] = Mirror(self.blank())

    def applied(self, name: str, epoch: int, content: dict[int, bytes]) -> None:
        """O1, O2: a mirror reports this epoch as applied and holds this content."""
        mirror = self.mirrors[name]
        if epoch < mirror.at_epoch:
            raise OracleError(f"{name} fell from epoch {mirror.at_epoch} to {epoch}")
        if epoch not in self.epoch_prefix:
            raise OracleError(f"{name} applied epoch {epoch}, which never was")
        sizes = self.epoch_sizes[epoch]
        for volume, size in sizes.items():
            known = mirror.content.setdefault(volume, bytearray())
            known.extend(bytes(size - len(known)))
        found = {volume: len(data) for volume, data in content.items()}
        if found != sizes:
            raise OracleError(f"{name} at epoch {epoch} has volumes {found}, not {sizes}")
        changed = {key for n in range(mirror.at_epoch + 1, epoch + 1) for key in self.changes[n]}
        for volume, block in changed:
            size = min(BLOCK, sizes[volume] - block * BLOCK)
            start = block * BLOCK
            mirror.content[volume][start : start + size] = self.block_at(volume, block, epoch)[
                :size
            ]
        mirror.at_epoch = epoch
        for volume, expected in mirror.content.items():
            if self._masked(name, volume, content[volume]) != self._masked(name, volume, expected):
                raise OracleError(
                    f"{name} at epoch {epoch}: volume {volume} differs from S("
                    f"{self.epoch_prefix[epoch]}) in block "
                    f"{first_difference(content[volume], expected)}"
                )
        self.checks += 1

    def _masked(self, name: str, volume: int, content: bytes | bytearray) -> bytes | bytearray:
        """The content without what rotted."""
        rotten = self.rotten.get(name)
        if not rotten:
            return content
        blocks = [block for owner, block in rotten if owner == volume]
        if not blocks:
            return content
        masked = bytearray(content)
        for block in blocks:
            part = masked[block * BLOCK : (block + 1) * BLOCK]
            masked[block * BLOCK : block * BLOCK + len(part)] = bytes(len(part))
        return masked


def first_difference(left: bytes, right: bytearray) -> int:
    """Number of the first block that differs."""
    for at in range(0, len(right), BLOCK):
        if left[at : at + BLOCK] != right[at : at + BLOCK]:
            return at // BLOCK
    return -1
