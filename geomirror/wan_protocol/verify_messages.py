"""The control messages of a verify."""

from __future__ import annotations

from geomirror.wan_protocol.message import Message


class VerifyPin(Message, frozen=True):
    """Primary to secondary: keep the content of this epoch readable from the moment that it is
    durable, for `VerifyAsk` of the same number. Sent before the commit of any later epoch. It takes
    the place of an earlier one, whose asks are not answered any more."""

    session: int
    number: int
    """Grows within the life of the primary."""
    epoch: int
    """Sealed at the primary; 0: keep nothing any more."""


class VerifyAsk(Message, frozen=True):
    """Primary to secondary: has this range the same content there, at the pinned epoch?"""

    session: int
    number: int
    """Of the `VerifyPin`."""
    ask: int
    volume: int
    first_block: int
    block_count: int
    region_blocks: int
    """A region has so many blocks; the last one may have fewer."""
    digests: bytes
    """16 bytes for each region (`docs/wire_format.md`, Verify)."""
    bytes_per_second: int
    """Read no faster than this."""


class VerifyAnswer(Message, frozen=True):
    """Secondary to primary: what became of a `VerifyAsk`."""

    session: int
    number: int
    ask: int
    compared_blocks: int
    """From the first one on, whole regions or all; the rest has to be asked about again. 0: that
    epoch cannot be read here (`reason`)."""
    different: list[tuple[int, bytes]]
    """Regions that are not the same, by their number in the ask, with 16 bytes for each block."""
    read_bytes: int
    reason: str = ""
