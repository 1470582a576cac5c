"""The network's authority: one Ed25519 key that says who is a member.

It signs node certificates, member entries and the revocation list. What a certificate says comes
from the token's record or the member's entry, never from the request. The authority's certificate
may sign only for its own network: a critical name constraint, which OpenSSL checks in handshakes.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Container

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from geomirror.environment import SECOND, Entropy
from geomirror.errors import ConfigError, RefusedError
from geomirror.tunnel.certificates import claim_uris, from_ns
from geomirror.tunnel.identity import key_hash, key_to_pem, new_key, public_bytes

CERTIFICATE_LIFETIME_NS = 24 * 3600 * SECOND
"""A stolen or revoked key is worth a day at most, even where the revocation does not arrive."""
CERTIFICATE_RENEWAL_NS = CERTIFICATE_LIFETIME_NS // 2
"""Age at which a node renews: the authority may be away for half a lifetime."""
CERTIFICATE_SKEW_NS = 300 * SECOND
"""How far a peer's clock may be behind ours."""
AUTHORITY_LIFETIME_NS = 10 * 365 * 86_400 * SECOND
"""The authority's own certificate: its key is replaced by rotation, not by expiry."""
DEFAULT_RANGE = "10.203.0.0/16"
"""Virtual addresses, when `network create` gives no range."""


class Authority:
    """The authority's private key and certificate; on the nodes with the role `authority` only."""

    def __init__(self, key: Ed25519PrivateKey, certificate: x509.Certificate, network: str) -> None:
        self._key = key
        self.certificate = certificate
        self.network = network
        self.public_key = key.public_key()

    def __repr__(self) -> str:
        return f"Authority(network={self.network!r}, key={key_hash(self.public_key).hex()[:16]!r})"

    @classmethod
    def create(cls, network: str, wall_ns: int, entropy: Entropy) -> Authority:
        """A new authority with its self-signed certificate."""
        key = new_key(entropy)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"geomirror network {network}")])
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        subtree = x509.UniformResourceIdentifier(network)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(_serial(entropy))
            .not_valid_before(from_ns(wall_ns - CERTIFICATE_SKEW_NS))
            .not_valid_after(from_ns(wall_ns + AUTHORITY_LIFETIME_NS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(is_authority=True), critical=True)
            .add_extension(identifier, critical=False)
            .add_extension(x509.NameConstraints([subtree], None), critical=True)
        )
        return cls(key, builder.sign(key, None), network)

    def key_pem(self) -> bytes:
        """The private key; for a file of mode 0600 only."""
        return key_to_pem(self._key)

    def sign(self, data: bytes) -> bytes:
        """A signature of 64 bytes; the caller prefixes `data` with what it is."""
        return self._key.sign(data)

    def issue(
        self,
        public_key: Ed25519PublicKey,
        *,
        name: str,
        site: str,
        address: str,
        roles: tuple[str, ...],
        wall_ns: int,
        entropy: Entropy,
    ) -> x509.Certificate:
        """A node certificate for 24 hours from `wall_ns`."""
        uris = claim_uris(self.network, name, site, address, roles)
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.public_key)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(_serial(entropy))
            .not_valid_before(from_ns(wall_ns - CERTIFICATE_SKEW_NS))
            .not_valid_after(from_ns(wall_ns + CERTIFICATE_LIFETIME_NS))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(names, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(issuer_key, critical=False)
        )
        return builder.sign(self._key, None)


def certificate_pem(certificate: x509.Certificate) -> str:
    """The text form of a certificate."""
    return certificate.public_bytes(Encoding.PEM).decode("ascii")


def check_range(cidr: str) -> str:
    """Normalize the range of virtual addresses. :raises ConfigError: not a usable IPv4 range."""
    try:
        network = ipaddress.IPv4Network(cidr)
    except ValueError:
        raise ConfigError(
            "--range is not an IPv4 network", hint=f'like "{DEFAULT_RANGE}"'
        ) from None
    if not 8 <= network.prefixlen <= 24:
        raise ConfigError("--range needs a prefix length from 8 to 24")
    return str(network)


def choose_address(public_key: Ed25519PublicKey, cidr: str, taken: Container[str]) -> str:
    """The virtual address of a key: its hash, counted on over addresses already taken.

    :raises RefusedError: no free address after 4096 tries, so the range is full.
    """
    network = ipaddress.IPv4Network(cidr)
    for attempt in range(4096):
        data = b"geomirror address v1\0" + public_bytes(public_key) + attempt.to_bytes(4, "little")
        number = int.from_bytes(hashlib.sha256(data).digest(), "big")
        # Without the first and the last address: they are the network's own and broadcast.
        address = str(network[1 + number % (network.num_addresses - 2)])
        if address not in taken:
            return address
    raise RefusedError(f"no virtual address is free in {cidr}", hint="revoke unused nodes")


def _serial(entropy: Entropy) -> int:
    return int.from_bytes(entropy.token_bytes(16), "big") >> 1 | 1


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
