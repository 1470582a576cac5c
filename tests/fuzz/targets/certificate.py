"""Certificates, requests and keys of strangers: an AuthError, or claims that were signed."""

from __future__ import annotations

import base64
import warnings
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning

from geomirror.environment import SECOND, SeededEntropy
from geomirror.errors import AuthError, IntegrityError
from geomirror.tunnel.authority import Authority
from geomirror.tunnel.certificates import (
    ROLES,
    check_dates,
    check_issued_by,
    claim_uris,
    load_certificate,
    public_key_of,
    read_claims,
)
from geomirror.tunnel.identity import NodeIdentity, key_from_pem, node_id_of, read_request
from tests.fuzz.source import Source

NOW_NS = 1_800_000_000 * SECOND
_DER, _PEM, _URIS, _REQUEST, _KEY = range(5)
INPUT_BYTES_MAX = 2048


@cache
def authority() -> Authority:
    """The network's authority; always the same."""
    return Authority.create("acme", NOW_NS, SeededEntropy("fuzz authority"))


@cache
def identity(number: int) -> NodeIdentity:
    """A node's key."""
    return NodeIdentity.create(SeededEntropy(f"fuzz node {number}"))


@cache
def node_certificate(number: int) -> x509.Certificate:
    """A good certificate."""
    return authority().issue(
        identity(number).public_key,
        name=f"west-{number}",
        site="west",
        address="10.203.0.7",
        roles=("member",),
        wall_ns=NOW_NS,
        entropy=SeededEntropy(number),
    )


def seeds() -> list[bytes]:
    """Good ones in every form."""
    good = node_certificate(1)
    uris = claim_uris("acme", "west-1", "west", "10.203.0.7", ("member", "witness"))
    return [
        bytes([_DER]) + good.public_bytes(Encoding.DER),
        bytes([_DER]) + authority().certificate.public_bytes(Encoding.DER),
        bytes([_PEM]) + good.public_bytes(Encoding.PEM),
        bytes([_URIS]) + "\n".join(uris).encode(),
        bytes([_REQUEST]) + base64.b64decode("".join(identity(1).request_pem().split("\n")[1:-2])),
        bytes([_KEY]) + identity(1).to_pem(),
    ]


def run(data: bytes) -> None:
    """DER, PEM, names of a certificate that is signed by the authority itself, a request, a key."""
    source = Source(data)
    kind, rest = source.below(5), source.rest()
    with warnings.catch_warnings():
        # Of serial numbers that are not positive; they change nothing for us.
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        _run(kind, rest)


def _run(kind: int, rest: bytes) -> None:
    if kind == _REQUEST:
        text = base64.b64encode(rest).decode()
        pem = f"-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n"
        _request(pem)
        _request(rest.decode("utf-8", "surrogateescape"))
    elif kind == _KEY:
        try:
            key_from_pem(rest, name="k")
        except IntegrityError as error:
            _must_not_repeat(rest, str(error))
    elif kind == _URIS:
        _uris(rest)
    else:
        _certificate(rest)


def _must_not_repeat(secret: bytes, text: str) -> None:
    assert len(secret) < 16 or secret.decode("latin-1") not in text


def _request(pem: str) -> None:
    try:
        key = read_request(pem)
    except AuthError:
        return
    assert node_id_of(key)


def _certificate(data: bytes) -> None:
    try:
        certificate = load_certificate(data)
        claims = read_claims(certificate)
        check_issued_by(certificate, authority().certificate)
        check_dates(claims, NOW_NS)
    except AuthError:
        return
    # Signed by the authority: it can only be the one that it gave.
    assert certificate.tbs_certificate_bytes == node_certificate(1).tbs_certificate_bytes
    assert claims.node_id == node_id_of(public_key_of(certificate))


def _uris(rest: bytes) -> None:
    texts = rest.decode("ascii", "ignore").split("\n")
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority().certificate.subject)
        .public_key(identity(2).public_key)
        .serial_number(7)
        .not_valid_before(node_certificate(1).not_valid_before_utc)
        .not_valid_after(node_certificate(1).not_valid_after_utc)
    )
    names = [x509.UniformResourceIdentifier(text) for text in texts]
    alternative = x509.SubjectAlternativeName(names)
    certificate = builder.add_extension(alternative, critical=False).sign(authority()._key, None)
    try:
        claims = read_claims(certificate)
    except AuthError:
        return
    found = claim_uris(claims.network, claims.name, claims.site, claims.address, claims.roles)
    assert found[0] == texts[0]
    assert sorted(found) == sorted(texts), "the claims are not what the certificate says"
    assert set(claims.roles) <= set(ROLES)
