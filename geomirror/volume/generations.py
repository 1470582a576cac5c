"""The generation chain as messages bring it, and as the superblock keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from geomirror.volume.superblock import GenerationRecord


class ChainEntry(Protocol):
    """One entry of a generation chain as messages carry it."""

    @property
    def identity(self) -> bytes: ...
    @property
    def token(self) -> int: ...
    @property
    def parent(self) -> bytes: ...
    @property
    def parent_epoch(self) -> int: ...
    @property
    def parent_hash(self) -> bytes: ...
    @property
    def reason(self) -> str: ...
    @property
    def by(self) -> str: ...
    @property
    def wall_ns(self) -> int: ...


def chain_records(chain: Sequence[ChainEntry]) -> list[GenerationRecord]:
    """The chain for the superblock, oldest first."""
    return [
        GenerationRecord(
            entry.identity.hex(),
            entry.token,
            entry.parent.hex(),
            entry.parent_epoch,
            entry.parent_hash.hex(),
            entry.reason,
            entry.by,
            entry.wall_ns,
        )
        for entry in chain
    ]


def is_on_chain(chain: Sequence[GenerationRecord], generation: str, epoch: int) -> bool:
    """Whether an epoch that was reached in a generation (hex) is on the history that a chain is:
    what was before a promotion stays so."""
    for at, entry in enumerate(chain):
        if entry.identity == generation:
            return at + 1 == len(chain) or chain[at + 1].parent_epoch >= epoch
    return False
