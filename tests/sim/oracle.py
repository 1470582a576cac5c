"""What must be true: the front end's log, and every image and position checked against it.

S(p) is the content after the first p operations of the log. O1: a mirror equals S(p) for exactly
the epoch it reports. O2: that never falls. O3: it is at least what was last reported durable. O4:
local recovery is at least the last flush reply and at least every mirror. O7 is the runner's.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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


@dataclass
class Mirror:
    """What is known of one secondary."""

    content: dict[int, bytearray]
    prefix: int = 0
    applied_epoch: int = 0
    durable_epoch: int = 0


@dataclass
class Oracle:
    """The log of one resource and all checks."""

    sizes: dict[int, int]
    log: list[Entry] = field(default_factory=list)
    undo: list[bytes] = field(default_factory=list)
    flushed: int = 0
    epoch_prefix: dict[int, int] = field(default_factory=dict)
    epoch_hash: dict[int, bytes] = field(default_factory=dict)
    sealed_epoch: int = 0
    mirrors: dict[str, Mirror] = field(default_factory=dict)
    checks: int = 0

    def __post_init__(self) -> None:
        self.content = self.blank()
        self.epoch_prefix[0] = 0

    def blank(self) -> dict[int, bytearray]:
        """All volumes as zeros."""
        return {volume: bytearray(size) for volume, size in self.sizes.items()}

    def add(self, entry: Entry) -> None:
        """An operation was handed to the primary."""
        self.undo.append(entry.apply(self.content))
        self.log.append(entry)

    def forget_last(self, count: int) -> None:
        """The last operations were refused: they never happened."""
        for _ in range(count):
            entry = self.log.pop()
            target = self.content[entry.volume]
            target[entry.offset : entry.offset + entry.length] = self.undo.pop()

    def cut(self, epoch: int) -> None:
        """The primary ended an epoch after the last operation."""
        self.epoch_prefix[epoch] = len(self.log)

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
        while any(content[volume] != target for volume, target in self.content.items()):
            if len(self.log) <= least:
                raise OracleError(f"recovered content is no prefix in [{least}, {total}]")
            entry = self.log.pop()
            old = self.undo.pop()
            target = self.content[entry.volume]
            target[entry.offset : entry.offset + entry.length] = old
        for epoch in [e for e, p in self.epoch_prefix.items() if p > len(self.log)]:
            if epoch <= sealed_epoch:
                raise OracleError(f"epoch {epoch} was recovered without its operations")
            del self.epoch_prefix[epoch]
        self.checks += 1
        return total - len(self.log)

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

    def applied(self, name: str, epoch: int, content: dict[int, bytes]) -> None:
        """O1, O2: a mirror reports this epoch as applied and holds this content."""
        mirror = self.mirrors[name]
        if epoch < mirror.applied_epoch:
            raise OracleError(f"{name} fell from epoch {mirror.applied_epoch} to {epoch}")
        mirror.applied_epoch = epoch
        prefix = self.epoch_prefix.get(epoch)
        if prefix is None:
            raise OracleError(f"{name} applied epoch {epoch}, which never was")
        for entry in self.log[mirror.prefix : prefix]:
            entry.apply(mirror.content)
        mirror.prefix = max(mirror.prefix, prefix)
        for volume, expected in mirror.content.items():
            if content[volume] != expected:
                raise OracleError(
                    f"{name} at epoch {epoch}: volume {volume} differs from S({prefix}) "
                    f"in block {first_difference(content[volume], expected)}"
                )
        self.checks += 1


def first_difference(left: bytes, right: bytearray) -> int:
    """Number of the first block that differs."""
    for at in range(0, len(right), 4096):
        if left[at : at + 4096] != right[at : at + 4096]:
            return at // 4096
    return -1
