"""What an undo file is of, and what is known of it without its contents."""

from __future__ import annotations

from dataclasses import dataclass

OPEN_EPOCH = (1 << 63) - 1
"""`to_epoch` of a pass that has not ended."""


@dataclass(frozen=True)
class PassLabel:
    """Which apply pass an undo file is of: it led from `from_epoch` to `to_epoch`."""

    generation: bytes
    """Of `to_epoch`; 16 bytes."""
    from_epoch: int
    """Exclusive: the state that the file restores."""
    to_epoch: int
    """Inclusive."""
    wall_ns: int = 0
    """When `to_epoch` was cut at the primary, Unix ns: for rewind points only."""
    chain_hash: bytes = bytes(32)
    """H(to_epoch)."""


@dataclass(frozen=True)
class PassInfo(PassLabel):
    """One undo file."""

    name: str = ""
    fault: str = ""
    """Why it is a gap: nothing before `to_epoch` can be restored any more (`undo_faults`)."""
    is_resync: bool = False
    """A resync, not epochs, led from one to the other; or it did in a part of it."""
    raw_bytes: int = 0
    """Old contents held, uncompressed; zeros count nothing."""
    stored_bytes: int = 0
    """Size of the file, or of this part of it."""
    start: int = 0
    """Where in the file it begins, for a group of a pass that is open."""

    @property
    def is_gap(self) -> bool:
        """The before-images are not there."""
        return bool(self.fault)

    @property
    def is_part(self) -> bool:
        """One of the groups of an open pass, not the whole of one."""
        return self.start > 0
