"""Node certificates: what they say, and how a presented one is judged.

What a certificate says (the claims) is in URI names, so that `openssl x509 -text` shows it:

    geomirror://NETWORK/NODE                    exactly once
    geomirror://NETWORK/NODE/site/SITE          exactly once
    geomirror://NETWORK/NODE/address/ADDRESS    exactly once
    geomirror://NETWORK/NODE/role/ROLE          one or more

Chain, signature, key usage and the network name constraint are OpenSSL's work during the handshake.
Dates are judged here with the injected clock, so that the message can tell a wrong clock from an
old certificate. The node id is computed from the key, never read.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from geomirror.environment import SECOND
from geomirror.errors import AuthError
from geomirror.tunnel.identity import UNREADABLE, node_id_of
from geomirror.tunnel.names import check_name

ROLE_AUTHORITY = "authority"
"""The node holds the authority's key. Never given by a token."""
ROLE_MEMBER = "member"
ROLE_WITNESS = "witness"
TOKEN_ROLES = (ROLE_MEMBER, ROLE_WITNESS)
"""Roles that a token may give."""
ROLES = (ROLE_AUTHORITY, *TOKEN_ROLES)

_SCHEME = "geomirror://"
_DAY_NS = 86_400 * SECOND
_URIS_MAX = 16


@dataclass(frozen=True)
class Claims:
    """What a node certificate says. Times are Unix ns."""

    network: str
    name: str
    site: str
    address: str
    roles: tuple[str, ...]
    node_id: str
    serial: str
    not_before_ns: int
    not_after_ns: int


def claim_uris(
    network: str, name: str, site: str, address: str, roles: tuple[str, ...]
) -> list[str]:
    """The URI names of a certificate."""
    base = f"{_SCHEME}{network}/{name}"
    return [base, f"{base}/site/{site}", f"{base}/address/{address}"] + [
        f"{base}/role/{role}" for role in roles
    ]


def to_ns(moment: datetime.datetime) -> int:
    """Unix ns of a certificate's date (whole seconds)."""
    return int(moment.timestamp()) * SECOND


def from_ns(wall_ns: int) -> datetime.datetime:
    """A certificate's date, whole seconds, UTC."""
    return datetime.datetime.fromtimestamp(wall_ns // SECOND, datetime.UTC)


def load_certificate(data: bytes) -> x509.Certificate:
    """Read PEM or DER. :raises AuthError: it is neither, or its key is not Ed25519."""
    try:
        if data.startswith(b"-----BEGIN"):
            certificate = x509.load_pem_x509_certificate(data)
        else:
            certificate = x509.load_der_x509_certificate(data)
        key = certificate.public_key()
    except UNREADABLE:
        raise AuthError("a certificate cannot be read") from None
    if not isinstance(key, Ed25519PublicKey):
        raise AuthError("a certificate is not for an Ed25519 key")
    return certificate


def public_key_of(certificate: x509.Certificate) -> Ed25519PublicKey:
    """The key of a certificate that `load_certificate` returned."""
    key = certificate.public_key()
    assert isinstance(key, Ed25519PublicKey)
    return key


def read_claims(certificate: x509.Certificate) -> Claims:
    """Parse the claims strictly. :raises AuthError: something is missing, doubled or unknown."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        # Anything but URIs is refused: a second kind of name is a second truth.
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        count = len(list(names))
    except UNREADABLE:
        raise AuthError("a certificate is not one of a node") from None
    if not 1 <= len(uris) == count <= _URIS_MAX or not uris[0].startswith(_SCHEME):
        raise AuthError("a certificate is not one of a node")
    network, _, name = uris[0].removeprefix(_SCHEME).partition("/")
    check_name(network, "network", error=AuthError)
    check_name(name, "node", error=AuthError)
    found: dict[str, list[str]] = {"site": [], "address": [], "role": []}
    for uri in uris[1:]:
        kind, _, value = uri.removeprefix(uris[0] + "/").partition("/")
        if not uri.startswith(uris[0] + "/") or kind not in found:
            raise AuthError(f'the certificate of "{name}" has an unknown name in it')
        found[kind].append(value)
    if len(found["site"]) != 1 or len(found["address"]) != 1 or not found["role"]:
        raise AuthError(f'the certificate of "{name}" is incomplete')
    if any(role not in ROLES for role in found["role"]):
        raise AuthError(f'the certificate of "{name}" has an unknown role')
    try:
        address = str(ipaddress.IPv4Address(found["address"][0]))
    except ValueError:
        raise AuthError(f'the certificate of "{name}" has a wrong address') from None
    return Claims(
        network=network,
        name=name,
        site=check_name(found["site"][0], "site", error=AuthError),
        address=address,
        roles=tuple(found["role"]),
        node_id=node_id_of(public_key_of(certificate)),
        serial=f"{certificate.serial_number:x}",
        not_before_ns=to_ns(certificate.not_valid_before_utc),
        not_after_ns=to_ns(certificate.not_valid_after_utc),
    )


def check_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    """Check one signature. :raises AuthError: another key signed it."""
    try:
        certificate.verify_directly_issued_by(authority)
    except UNREADABLE:
        raise AuthError("a certificate is not signed by the authority of this network") from None


def check_dates(claims: Claims, wall_ns: int) -> None:
    """Judge the dates with our clock.

    :raises AuthError: not valid yet, or expired; within a day a wrong clock is the likely cause,
        and the message says so.
    """
    if claims.not_before_ns <= wall_ns < claims.not_after_ns:
        return
    is_early = wall_ns < claims.not_before_ns
    distance_ns = claims.not_before_ns - wall_ns if is_early else wall_ns - claims.not_after_ns
    seconds = distance_ns // SECOND
    what = f"is valid only in {seconds} s" if is_early else f"expired {seconds} s ago"
    hint = f'restart "geomirror node run" on "{claims.name}": it renews its certificate'
    if distance_ns < _DAY_NS or is_early:
        hint = "compare the clocks of both nodes (clock skew); " + hint
    raise AuthError(f'the certificate of "{claims.name}" {what}', hint=hint)
