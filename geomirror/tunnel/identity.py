"""A node's identity: one Ed25519 key. Everything else (name, site, roles) is said by certificates.

The key is made of injected entropy and never changes hands: a certificate request carries only its
public half, signed by the private one as the proof of possession.
"""

from __future__ import annotations

import hashlib

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from geomirror.environment import Entropy
from geomirror.errors import AuthError, GeomirrorError, IntegrityError

UNREADABLE = (
    ValueError,
    TypeError,
    InternalError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""All that `cryptography` raises over strangers' certificates, requests and keys; half of these are
no ValueErrors, some come only when a part is looked at, and a key of a wrong length is called an
internal error."""

NODE_ID_BYTES = 16
"""Half of a SHA-256: 2^64 keys before two nodes meet, and it fits on a line of a status table."""

# Encodings of Edwards points of order 1, 2, 4 and 8 (sign bit cleared). A signature of such a key
# can be forged for any message, so whoever enrols one could be impersonated by everybody.
_WEAK_PUBLIC_KEYS = frozenset(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)


def public_bytes(key: Ed25519PublicKey) -> bytes:
    """The 32 raw bytes of a public key."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def key_hash(key: Ed25519PublicKey) -> bytes:
    """SHA-256 of a public key: how a join token names the authority."""
    return hashlib.sha256(b"geomirror key v1\0" + public_bytes(key)).digest()


def node_id_of(key: Ed25519PublicKey) -> str:
    """The node id: the first half of the key's hash, in hex. It cannot be chosen."""
    return key_hash(key)[:NODE_ID_BYTES].hex()


def is_weak(key: Ed25519PublicKey) -> bool:
    """Whether the key is a point of small order."""
    raw = public_bytes(key)
    return raw[:31] + bytes((raw[31] & 0x7F,)) in _WEAK_PUBLIC_KEYS


class NodeIdentity:
    """The private key of this node."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key()
        self.node_id = node_id_of(self.public_key)

    def __repr__(self) -> str:
        return f"NodeIdentity(node_id={self.node_id!r})"

    @classmethod
    def create(cls, entropy: Entropy) -> NodeIdentity:
        """A new identity from 32 bytes of `entropy`."""
        return cls(new_key(entropy))

    @classmethod
    def from_pem(cls, pem: bytes, *, name: str) -> NodeIdentity:
        """Read a PKCS #8 key. :raises IntegrityError: it is not an Ed25519 key."""
        return cls(key_from_pem(pem, name=name))

    def to_pem(self) -> bytes:
        """The private key, unencrypted PKCS #8; for a file of mode 0600 only."""
        return key_to_pem(self._key)

    def sign(self, data: bytes) -> bytes:
        """A signature of 64 bytes."""
        return self._key.sign(data)

    def request_pem(self) -> str:
        """A certificate request. It asks for nothing: the authority decides what it signs."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(self._key, None).public_bytes(Encoding.PEM).decode("ascii")


def new_key(entropy: Entropy) -> Ed25519PrivateKey:
    """A private key made of 32 bytes of `entropy`."""
    return Ed25519PrivateKey.from_private_bytes(entropy.token_bytes(32))


def key_to_pem(key: Ed25519PrivateKey) -> bytes:
    """Unencrypted PKCS #8."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def key_from_pem(pem: bytes, *, name: str) -> Ed25519PrivateKey:
    """Read a private key file.

    :param name: the file's path, for the message; the content never gets into it.
    :raises IntegrityError: not an unencrypted Ed25519 key.
    """
    try:
        key = load_pem_private_key(pem, None)
    except UNREADABLE:
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise IntegrityError(f"{name} is not an Ed25519 private key", hint="restore it")
    return key


def read_request(pem: str, *, error: type[GeomirrorError] = AuthError) -> Ed25519PublicKey:
    """Take the public key out of a certificate request, whatever else that asks for.

    :raises GeomirrorError: `error`: malformed, not signed by its own key, or a weak key.
    """
    try:
        request = x509.load_pem_x509_csr(pem.encode("ascii"))
        key = request.public_key()
        is_signed = request.is_signature_valid
    except UNREADABLE:
        raise error("the certificate request cannot be read") from None
    if not isinstance(key, Ed25519PublicKey):
        raise error("the certificate request is not for an Ed25519 key")
    if not is_signed:
        raise error("the certificate request is not signed by its own key")
    if is_weak(key):
        raise error("the certificate request is for a weak key")
    return key
