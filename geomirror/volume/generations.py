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
