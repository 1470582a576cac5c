"""Keys of WireGuard: one pair for a node, one pre-shared key for two nodes; and how they are told.

    pre-shared key = SHA-256("geomirror wireguard psk v1\\0" + share of the lower node id
                                                            + share of the higher one)

A share is 32 random bytes that a node tells one neighbour, over their mutually authenticated link,
together with its public key and the UDP port it keeps for that neighbour: a key record. Whoever
steals a node's private key still lacks the shares of all its pairs.

Nobody's record but a neighbour's own is ever used for it, so records need no signature.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from geomirror.environment import Entropy
from geomirror.errors import AuthError
from geomirror.tunnel.decoding import convert
from geomirror.tunnel.token import Secret

KEY_BYTES = 32
"""Of a private, public or pre-shared key, and of a share."""


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a node tells one neighbour. Unknown fields are left out: later versions may add some."""

    public_key: str
    """Base64 of 32 bytes, as `wg` writes it."""
    port: int
    """UDP port that the sender keeps for this neighbour."""
    share: str
    """Base64 of 32 secret bytes."""

    def __repr__(self) -> str:
        return f"KeyRecord(public_key={self.public_key!r}, port={self.port})"


def read_record(value: Any) -> KeyRecord:
    """Check a neighbour's record. :raises AuthError: it is none; its content is not repeated."""
    record: KeyRecord = convert(value, KeyRecord, AuthError("a key record cannot be read"))
    if not 1 <= record.port <= 65535:
        raise AuthError("a key record has no UDP port")
    if key_bytes(record.public_key) == bytes(KEY_BYTES):
        raise AuthError("a key record has a key that is no key")
    key_bytes(record.share)
    return record


def key_bytes(text: str) -> bytes:
    """The 32 bytes of a key. :raises AuthError: it is not base64 of 32 bytes, as `wg` writes it."""
    try:
        found = base64.b64decode(text.encode("ascii"), validate=True)
    except (ValueError, binascii.Error):
        found = b""
    if len(found) != KEY_BYTES or key_text(found) != text:
        raise AuthError("a key is not base64 of 32 bytes")
    return found


def key_text(data: bytes) -> str:
    """As `wg` reads and writes keys."""
    return base64.b64encode(data).decode("ascii")


def new_private_key(entropy: Entropy) -> Secret:
    """32 bytes with the curve's fixed bits set, as WireGuard shows them: that is compared."""
    data = bytearray(entropy.token_bytes(KEY_BYTES))
    data[0] &= 0xF8
    data[31] = data[31] & 0x7F | 0x40
    return Secret(bytes(data))


def public_key_of(private_key: Secret) -> str:
    """The public half, base64."""
    key = X25519PrivateKey.from_private_bytes(private_key.reveal()).public_key()
    return key_text(key.public_bytes(Encoding.Raw, PublicFormat.Raw))


def pre_shared_key(node_id: str, share: bytes, other_id: str, other_share: bytes) -> Secret:
    """The same for both neighbours, whoever computes it."""
    assert node_id != other_id
    shares = share + other_share if node_id < other_id else other_share + share
    return Secret(hashlib.sha256(b"geomirror wireguard psk v1\0" + shares).digest())
