"""What all control messages have in common."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=False):
    """Base of all messages: a tagged array on the wire."""
