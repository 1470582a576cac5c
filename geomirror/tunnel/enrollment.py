"""The join exchange, both sides, without sockets: what is said, what is checked, what is decided.

    joiner                                     authority (TLS, ALPN geomirror-join/1)
      ◀── Hello(authority certificate, nonce, wall clock)
      checks: key hash = token's, the TLS leaf is signed by it and has the role `authority`
      Join(token id, secret, request, name, endpoints) ──▶
      ◀── Welcome(certificate, members, range)   or Refuse(code, message, hint)

A node whose certificate expired while it was away says Renew instead of Join: a signature over the
nonce and the leaf, made with the key that the network knows. One JSON object per line.

Invariant: the secret leaves the joiner only once the server is proven to be the token's authority;
the token is durably used up before the certificate leaves the authority (the shell sees to that).
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Any

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from geomirror.environment import SECOND, Entropy
from geomirror.errors import (
    AuthError,
    GeomirrorError,
    RefusedError,
    RemoteProtocolError,
    TokenError,
    from_wire,
)
from geomirror.limits import Limits
from geomirror.tunnel.addresses import has_same_ipv6
from geomirror.tunnel.authority import (
    CERTIFICATE_SKEW_NS,
    Authority,
    certificate_pem,
    choose_address,
)
from geomirror.tunnel.certificates import (
    ROLE_AUTHORITY,
    check_dates,
    check_issued_by,
    load_certificate,
    public_key_of,
    read_claims,
)
from geomirror.tunnel.decoding import decode_json
from geomirror.tunnel.dialable import dialable
from geomirror.tunnel.identity import NodeIdentity, key_hash, node_id_of, read_request
from geomirror.tunnel.membership import Member, Membership, Signed, sign_member
from geomirror.tunnel.names import check_name
from geomirror.tunnel.token import ID_BYTES, SECRET_BYTES, Secret, Token, TokenBook

VERSION = 1
NONCE_BYTES = 32


class Hello(msgspec.Struct, tag="hello", kw_only=True):
    """The authority introduces itself; nothing in it is trusted before it is checked."""

    version: int
    network: str
    authority: str
    nonce: bytes
    wall_ns: int


class Join(msgspec.Struct, tag="join", kw_only=True):
    """The joiner asks with its token."""

    token_id: str
    secret: bytes
    request: str
    node: str | None
    endpoints: list[str]

    def __repr__(self) -> str:
        return f"Join(token_id={self.token_id!r})"


class Renew(msgspec.Struct, tag="renew", kw_only=True):
    """A member whose certificate is no longer accepted on links asks for a new one."""

    request: str
    proof: bytes


class Welcome(msgspec.Struct, tag="welcome", kw_only=True):
    """The answer: a certificate and everything the network knows of its members."""

    certificate: str
    range: str
    members: list[Signed]


class Refuse(msgspec.Struct, tag="refuse", kw_only=True):
    """The answer in the other case; `code` is a wire code of `errors.py`."""

    code: int
    message: str
    hint: str = ""


def encode_line(message: Hello | Join | Renew | Welcome | Refuse) -> bytes:
    """One line, with its end."""
    return msgspec.json.encode(message) + b"\n"


def read_hello(line: bytes) -> Hello:
    """Parse the first line; the server is a stranger still.

    :raises RemoteProtocolError: not a hello of a version that we speak.
    :raises RefusedError: it serves no join exchange now; its words, but never another class.
    """
    hello: Hello | Refuse = _decode(line, Hello | Refuse)
    if isinstance(hello, Refuse):
        raise RefusedError(_printable(hello.message), hint=_printable(hello.hint))
    if hello.version != VERSION or len(hello.nonce) != NONCE_BYTES:
        raise RemoteProtocolError("the authority speaks another version of the join exchange")
    return hello


def read_request_line(line: bytes) -> Join | Renew:
    """:raises RemoteProtocolError: not a request."""
    request: Join | Renew = _decode(line, Join | Renew)
    if isinstance(request, Join):
        is_hex = len(request.token_id) == 2 * ID_BYTES and set(request.token_id) <= set(
            "0123456789abcdef"
        )
        if not is_hex or len(request.secret) != SECRET_BYTES:
            raise RemoteProtocolError("a join request is malformed")
    return request


def read_reply(line: bytes) -> Welcome:
    """:raises GeomirrorError: the error that the authority refused with."""
    reply: Welcome | Refuse = _decode(line, Welcome | Refuse)
    if isinstance(reply, Refuse):
        error = from_wire(reply.code, _printable(reply.message))
        error.hint = _printable(reply.hint)
        raise error
    return reply


def refusal(error: GeomirrorError) -> Refuse:
    """The line that tells an error."""
    return Refuse(code=error.wire_code, message=error.message, hint=error.hint)


def _decode(line: bytes, kind: Any) -> Any:
    unreadable = RemoteProtocolError("a line of the join exchange cannot be read")
    return decode_json(line, kind, unreadable)


def _printable(text: str) -> str:
    # What a peer says ends in logs and terminals: no control characters, no endless lines.
    return "".join(c if c.isprintable() else "?" for c in text[:500])


@dataclass(frozen=True)
class Enrolled:
    """What the joiner has to keep, checked."""

    network: str
    authority: x509.Certificate
    certificate: x509.Certificate
    range: str
    membership: Membership


class Joiner:
    """The joining side of one exchange."""

    def __init__(
        self, token: Token, identity: NodeIdentity, *, node: str | None, limits: Limits
    ) -> None:
        self._token = token
        self._identity = identity
        self._node = node
        self._limits = limits
        self._authority: x509.Certificate | None = None

    def receive_hello(
        self, line: bytes, leaf_der: bytes, endpoints: tuple[str, ...], wall_ns: int
    ) -> bytes:
        """Check who is there; only then return the line with the secret.

        :param leaf_der: the certificate that the TLS handshake proved possession of.
        :raises AuthError: the server is not the authority of the token's network, or the clocks
            differ by more than certificates bear. Nothing may be sent then.
        """
        hello = read_hello(line)
        authority = load_certificate(hello.authority.encode("utf-8", "replace"))
        stranger = AuthError(
            "the server is not the authority that made this token",
            hint="check the address in front of it; somebody may be intercepting the connection",
        )
        found = key_hash(public_key_of(authority))
        if not hmac.compare_digest(found, self._token.authority_hash):
            raise stranger
        try:
            check_issued_by(authority, authority)
            leaf = load_certificate(leaf_der)
            check_issued_by(leaf, authority)
            claims = read_claims(leaf)
        except AuthError:
            raise stranger from None
        if claims.network != self._token.network or ROLE_AUTHORITY not in claims.roles:
            raise stranger
        skew_ns = wall_ns - hello.wall_ns
        if abs(skew_ns) > CERTIFICATE_SKEW_NS:
            direction = "ahead of" if skew_ns > 0 else "behind"
            raise AuthError(
                f"this machine's clock is {abs(skew_ns) // SECOND} s {direction} the authority's",
                hint="set the clocks (clock skew), then join again",
            )
        check_dates(claims, wall_ns)
        self._authority = authority
        request = Join(
            token_id=self._token.token_id,
            secret=self._token.secret.reveal(),
            request=self._identity.request_pem(),
            node=self._node,
            endpoints=list(endpoints),
        )
        return encode_line(request)

    def receive_reply(self, line: bytes, wall_ns: int) -> Enrolled:
        """Check what came for the token.

        :raises GeomirrorError: what the authority refused with (TokenError, RefusedError, …).
        :raises AuthError: the welcome does not fit this key or this network.
        """
        assert self._authority is not None, "receive_hello first"
        welcome = read_reply(line)
        certificate = check_own_certificate(
            welcome.certificate, self._authority, self._identity, self._token.network, wall_ns
        )
        membership = Membership(self._token.network, public_key_of(self._authority), self._limits)
        membership.merge(welcome.members)
        if membership.by_id(self._identity.node_id) is None:
            raise AuthError("the welcome does not list this node as a member")
        return Enrolled(
            self._token.network, self._authority, certificate, welcome.range, membership
        )


def check_own_certificate(
    pem: str, authority: x509.Certificate, identity: NodeIdentity, network: str, wall_ns: int
) -> x509.Certificate:
    """Check a certificate issued to this node. :raises AuthError: it does not fit."""
    certificate = load_certificate(pem.encode("utf-8", "replace"))
    check_issued_by(certificate, authority)
    claims = read_claims(certificate)
    if claims.node_id != identity.node_id or claims.network != network:
        raise AuthError("the certificate received is not for this node's key")
    check_dates(claims, wall_ns)
    return certificate


def renewal_proof(nonce: bytes, leaf_der: bytes, request: str) -> bytes:
    """What a member signs to renew without a valid certificate: for this server, this time only."""
    parts = (nonce, hashlib.sha256(leaf_der).digest(), hashlib.sha256(request.encode()).digest())
    return b"geomirror renew v1\0" + b"".join(parts)


@dataclass
class Desk:
    """The authority's side: decides requests on its records, which the shell loads and stores."""

    authority: Authority
    book: TokenBook
    membership: Membership
    range: str
    limits: Limits

    def join(self, request: Join, *, observed_host: str, wall_ns: int, entropy: Entropy) -> Welcome:
        """Consume a token. The caller makes book, then membership durable, then sends the result.

        :raises TokenError: see `TokenBook.check`.
        :raises RefusedError: the name or the key is taken, or the network is full.
        """
        key = read_request(request.request)
        node_id = node_id_of(key)
        record = self.book.check(request.token_id, Secret(request.secret), node_id, wall_ns)
        known = self.membership.by_id(node_id)
        if known is not None:
            # The same key again: its welcome was lost. Its entry stands, it gets a certificate.
            if record.used_by_id != node_id or self.membership.is_revoked(node_id):
                raise RefusedError(f'this key already belongs to the node "{known.name}"')
            return self.issue_to(key, known, wall_ns, entropy)
        name = record.used_by or record.node or request.node
        if name is None:
            raise TokenError("neither the token nor the joiner names the node", hint="give --node")
        check_name(name, "node", error=RefusedError)
        self._check_free(name, node_id)
        member = Member(
            network=self.authority.network,
            node_id=node_id,
            name=name,
            site=record.site,
            roles=(record.role,),
            endpoints=dialable(request.endpoints, observed_host),
            address=choose_address(key, self.range, self._taken()),
            serial="",
            version=self.membership.version + 1,
        )
        self.book.consume(record, name, node_id, wall_ns)
        return self.issue_to(key, member, wall_ns, entropy)

    def renew(
        self, request: Renew, nonce: bytes, leaf_der: bytes, *, wall_ns: int, entropy: Entropy
    ) -> Welcome:
        """A new certificate for a member that proves its key. :raises AuthError: it does not."""
        key = read_request(request.request)
        try:
            key.verify(request.proof, renewal_proof(nonce, leaf_der, request.request))
        except InvalidSignature:
            raise AuthError("the request to renew is not signed by the node's key") from None
        return self.issue_to(key, self.member_of(key), wall_ns, entropy)

    def member_of(self, key: Ed25519PublicKey) -> Member:
        """The active member with this key. :raises AuthError: none, or revoked."""
        member = self.membership.by_id(node_id_of(key))
        if member is None:
            raise AuthError("this key is not a member of the network", hint="join with a token")
        if self.membership.is_revoked(member.node_id):
            raise AuthError(
                f'the node "{member.name}" is revoked', hint="join again with a new data directory"
            )
        return member

    def _check_free(self, name: str, node_id: str) -> None:
        similar = self.membership.find_similar(name)
        if similar is not None:
            raise RefusedError(
                f'the network already has a node named "{similar.name}"',
                hint="make a token for another name, or revoke that node first",
            )
        if len(self.membership.active()) >= self.limits.peers_max:
            raise RefusedError(f"the network is full ({self.limits.peers_max} nodes)")
        twin = has_same_ipv6(node_id, self.membership.members())
        if twin is not None:
            raise RefusedError(
                f'this key would have the IPv6 address of "{twin.name}"',
                hint="join with a new data directory: it gets another key",
            )

    def _taken(self) -> frozenset[str]:
        return frozenset(member.address for member in self.membership.members())

    def issue_to(
        self, key: Ed25519PublicKey, member: Member, wall_ns: int, entropy: Entropy
    ) -> Welcome:
        """A certificate that says what the member's entry says, and all entries with it."""
        certificate = self.authority.issue(
            key,
            name=member.name,
            site=member.site,
            address=member.address,
            roles=member.roles,
            wall_ns=wall_ns,
            entropy=entropy,
        )
        if not member.serial:
            member = msgspec.structs.replace(member, serial=f"{certificate.serial_number:x}")
            self.membership.merge([sign_member(self.authority, member)])
        return Welcome(
            certificate=certificate_pem(certificate),
            range=self.range,
            members=self.membership.updates(),
        )
