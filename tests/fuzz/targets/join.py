"""The join exchange: what a stranger says to the authority, and what a server says to a joiner.

The authority's side never gives a certificate without a token's secret or a member's key, and an
answer that is an error changes nothing. `@NAME@` in an input stands for something real.
"""

from __future__ import annotations

import contextlib
import copy
import ipaddress
import json
import socket
from dataclasses import dataclass
from functools import cache

import msgspec
from cryptography.hazmat.primitives.serialization import Encoding

from geomirror.environment import SECOND, SeededEntropy
from geomirror.errors import AuthError, GeomirrorError, RemoteProtocolError
from geomirror.limits import PRODUCTION
from geomirror.tunnel.authority import certificate_pem
from geomirror.tunnel.certificates import load_certificate, read_claims
from geomirror.tunnel.enrollment import (
    Desk,
    Join,
    Joiner,
    encode_line,
    read_request_line,
    refusal,
    renewal_proof,
)
from geomirror.tunnel.identity import key_hash
from geomirror.tunnel.membership import Membership
from geomirror.tunnel.token import TokenBook, parse_token
from tests.fuzz.source import Source
from tests.fuzz.targets.certificate import NOW_NS, authority, identity, node_certificate

_ASKED, _HELLO, _REPLY = range(3)
NONCE = bytes(range(32))
LEAF = b"the leaf of our side"
INPUT_BYTES_MAX = 2048


@dataclass
class _World:
    """A network with one member, one unused token, one that the member used, one expired."""

    book: TokenBook
    membership: Membership
    words: dict[str, str]
    token_text: str


@cache
def _world() -> _World:
    book = TokenBook()
    membership = Membership("acme", authority().public_key, PRODUCTION)
    entropy = SeededEntropy("fuzz tokens")
    options = {
        "network": "acme",
        "authority_hash": key_hash(authority().public_key),
        "endpoints": ("203.0.113.7:7701",),
        "site": "west",
        "role": "member",
        "entropy": entropy,
        "limits": PRODUCTION,
    }
    free = book.create(node="west-3", expires_seconds=600, wall_ns=NOW_NS, **options)
    used = book.create(node=None, expires_seconds=600, wall_ns=NOW_NS, **options)
    old = book.create(node=None, expires_seconds=1, wall_ns=NOW_NS - 10 * SECOND, **options)
    words = {}
    for word, token in (("FREE", free), ("USED", used), ("OLD", old)):
        words[f"@{word}@"] = token.token_id
        secret = json.loads(encode_line(_join(token.token_id, token.secret.reveal(), 1)))["secret"]
        words[f"@{word}_SECRET@"] = secret
    desk = Desk(authority(), book, membership, "10.203.0.0/16", PRODUCTION)
    request = _join(used.token_id, used.secret.reveal(), 1)
    welcome = desk.join(request, observed_host="h", wall_ns=NOW_NS, entropy=SeededEntropy(1))
    for number in (1, 2, 3):
        pem = identity(number).request_pem()
        words[f"@CSR{number}@"] = json.dumps(pem)[1:-1]
        proof = identity(number).sign(renewal_proof(NONCE, LEAF, pem))
        words[f"@PROOF{number}@"] = json.loads(_encoded(proof))
    words["@AUTHORITY@"] = json.dumps(certificate_pem(authority().certificate))[1:-1]
    words["@MEMBERS@"] = json.loads(json.dumps(encode_line(welcome).decode()))[:-1]
    words["@CERTIFICATE@"] = json.dumps(welcome.certificate)[1:-1]
    words["@WALL@"] = str(NOW_NS)
    return _World(book, membership, words, free.to_text())


def _join(token_id: str, secret: bytes, number: int) -> Join:
    pem = identity(number).request_pem()
    return Join(token_id=token_id, secret=secret, request=pem, node="west-1", endpoints=["h:1"])


def _encoded(data: bytes) -> bytes:
    return msgspec.json.encode(data)


WORDS = [
    *(f"@{a}@".encode() for a in ("FREE", "USED", "OLD", "FREE_SECRET", "USED_SECRET")),
    *(f"@{a}@".encode() for a in ("CSR1", "CSR2", "CSR3", "PROOF1", "PROOF2", "AUTHORITY")),
    *(b'"west-1"', b'"WEST-1"', b'"localhost"', b"null", b'"0.0.0.0:7"', b'"169.254.169.254:80"'),
    *(b'"0xa9fea9fe:80"', b'"[::ffff:169.254.1.1]:80"', b'"[::0]:7"', b'"169.254.43518:80"'),
]


def seeds() -> list[bytes]:
    """Every line of good exchanges, and of those that are refused."""
    asked = [
        f'{{"type":"join","token_id":"@{token}@","secret":"@{token}_SECRET@","request":"@CSR{key}@",'
        f'"node":"{name}","endpoints":["0.0.0.0:7701","[2001:db8::1]:7"]}}'
        for token, key, name in (
            ("FREE", 2, "colo-1"),
            ("USED", 1, "x"),
            ("USED", 2, "x"),
            ("OLD", 3, "y"),
        )
    ]
    asked += [f'{{"type":"renew","request":"@CSR{key}@","proof":"@PROOF{key}@"}}' for key in (1, 2)]
    nonce = json.loads(_encoded(NONCE))
    hello = (
        '{"type":"hello","version":1,"network":"acme","authority":"@AUTHORITY@",'
        f'"nonce":"{nonce}","wall_ns":@WALL@}}'
    )
    refuse = '{"type":"refuse","code":17,"message":"no \\u0007","hint":"h"}'
    return [
        *(bytes([_ASKED]) + line.encode() for line in asked),
        *(bytes([_HELLO]) + line.encode() for line in (hello, refuse)),
        *(bytes([_REPLY]) + line.encode() for line in ("@MEMBERS@", refuse)),
    ]


def run(data: bytes) -> None:
    """One line to the authority, or one or two lines from a server to a joiner."""
    source = Source(data)
    side = source.below(3)
    text = source.rest().decode("utf-8", "surrogateescape")
    for word, real in _world().words.items():
        text = text.replace(word, real)
    line = text.encode("utf-8", "surrogateescape")[: PRODUCTION.join_line_bytes_max]
    if side == _ASKED:
        _ask(line)
    else:
        _answer(line, is_hello=side == _HELLO)


def _ask(line: bytes) -> None:
    world = _world()
    book = TokenBook(dict(world.book.records))
    membership = copy.copy(world.membership)
    desk = Desk(authority(), book, membership, "10.203.0.0/16", PRODUCTION)
    before = (book.to_json(), membership.to_json())
    entropy = SeededEntropy("answer")
    try:
        request = read_request_line(line)
        if isinstance(request, Join):
            welcome = desk.join(
                request, observed_host="198.51.100.9", wall_ns=NOW_NS, entropy=entropy
            )
        else:
            welcome = desk.renew(request, NONCE, LEAF, wall_ns=NOW_NS, entropy=entropy)
    except GeomirrorError as error:
        assert (book.to_json(), membership.to_json()) == before, "a refusal changed something"
        said = encode_line(refusal(error)).decode("utf-8", "replace")
        for word, secret in world.words.items():
            is_told = word.endswith("SECRET@") and secret in said and secret.encode() not in line
            assert not is_told, "an answer has a secret"
        return
    certificate = load_certificate(welcome.certificate.encode())
    claims = read_claims(certificate)
    assert membership.by_id(claims.node_id) is not None
    assert claims.roles == ("member",)
    if isinstance(request, Join):
        record = book.records[request.token_id]
        assert record.used_by_id == claims.node_id, "a certificate without a used token"
        assert record.expires_ns > NOW_NS
    assert read_request_line(encode_line(request)) == request
    again = Membership.from_json(membership.to_json(), "acme", authority().public_key, PRODUCTION)
    assert again.members() == membership.members()
    for endpoint in membership.by_id(claims.node_id).endpoints:
        _check_endpoint(endpoint)


def _check_endpoint(endpoint: str) -> None:
    """What members are sent to: no address that means another host to each of them."""
    host = endpoint.rpartition(":")[0].strip("[]")
    with contextlib.suppress(OSError):
        host = socket.inet_ntoa(socket.inet_aton(host))  # Of every spelling that resolvers know.
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        assert not (address.is_link_local or address.is_multicast or address.is_unspecified)


def _answer(line: bytes, *, is_hello: bool) -> None:
    world = _world()
    token = parse_token(world.token_text, PRODUCTION)
    joiner = Joiner(token, identity(1), node=None, limits=PRODUCTION)
    good = node_certificate(1)
    leaf = good.public_bytes(Encoding.DER)
    secret = world.words["@FREE_SECRET@"]
    if is_hello:
        # The leaf is a plain member's: nobody may get the secret, whatever he says.
        try:
            said = joiner.receive_hello(line, leaf, (), NOW_NS)
        except GeomirrorError as error:
            assert secret in line.decode(errors="replace") or secret not in str(error)
            assert str(error).isprintable()
            return
        raise AssertionError(f"the secret was told: {said!r}")
    joiner._authority = authority().certificate
    try:
        enrolled = joiner.receive_reply(line, NOW_NS)
    except GeomirrorError as error:
        assert isinstance(error, AuthError | RemoteProtocolError) or error.message.isprintable()
        return
    assert read_claims(enrolled.certificate).node_id == identity(1).node_id
    assert enrolled.membership.by_id(identity(1).node_id) is not None
