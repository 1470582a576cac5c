"""Join tokens: the text that an operator carries, and the records that the authority keeps.

    gm1.BASE64URL( check[4] ‖ MessagePack [network, authority key hash[32], endpoints, id[8],
                                           secret[32], expiry in Unix seconds] )

The check is the start of a SHA-256, so that a token copied incompletely is called damaged and not
unknown. The authority keeps a hash of the secret. A record is consumed once, by one key; the same
key may ask again until expiry (its welcome was lost on the way), anybody else is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass, field

import msgspec

from geomirror.environment import SECOND, Entropy
from geomirror.errors import IntegrityError, RefusedError, TokenError, UsageError
from geomirror.limits import Limits
from geomirror.tunnel.certificates import ROLE_MEMBER, TOKEN_ROLES
from geomirror.tunnel.decoding import decode_json, decode_msgpack
from geomirror.tunnel.names import check_endpoints, check_name

PREFIX = "gm1."
SECRET_BYTES = 32
ID_BYTES = 8
EXPIRES_SECONDS_MIN = 1
EXPIRES_SECONDS_MAX = 30 * 86_400
"""A month: a token in a drawer is a key to the network."""

_CHECK_BYTES = 4
_NEW = 'make a new one with "geomirror token create"'


class Secret:
    """Secret bytes that no repr, log or exception shows."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def __repr__(self) -> str:
        return "Secret(hidden)"

    def reveal(self) -> bytes:
        """The bytes; only for the one place that sends or hashes them."""
        return self._value


class _Wire(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    network: str
    authority_hash: bytes
    endpoints: list[str]
    token_id: bytes
    secret: bytes
    expires_seconds: int

    def __repr__(self) -> str:
        return "_Wire(hidden)"


@dataclass(frozen=True)
class Token:
    """A parsed token."""

    network: str
    authority_hash: bytes
    """`key_hash` of the authority's public key."""
    endpoints: tuple[str, ...]
    token_id: str
    """Hex; names the token in messages, it is no secret."""
    secret: Secret
    expires_ns: int
    """Unix ns, by the authority's clock."""

    def to_text(self) -> str:
        """The printed form."""
        wire = _Wire(
            self.network,
            self.authority_hash,
            list(self.endpoints),
            bytes.fromhex(self.token_id),
            self.secret.reveal(),
            self.expires_ns // SECOND,
        )
        body = msgspec.msgpack.encode(wire)
        return PREFIX + base64.urlsafe_b64encode(_check(body) + body).rstrip(b"=").decode("ascii")


def parse_token(text: str, limits: Limits) -> Token:
    """Parse and validate a printed token; surrounding white space is ignored.

    :raises TokenError: it is not a token, or damaged. The message does not repeat the text.
    """
    text = text.strip()
    if len(text) > limits.token_text_bytes_max or not text.startswith(PREFIX):
        raise TokenError('this is not a join token: it begins with "gm1."', hint=_NEW)
    damaged = TokenError("the join token is damaged or incomplete", hint="copy the whole line")
    encoded = text[len(PREFIX) :]
    try:
        # Python's decoder skips foreign characters; a damaged token must not pass for another one.
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise damaged from None
    body = data[_CHECK_BYTES:]
    # The last character may have bits that the decoder drops: as printed, or not at all.
    if base64.urlsafe_b64encode(data).rstrip(b"=") != encoded.encode():
        raise damaged
    if not hmac.compare_digest(data[:_CHECK_BYTES], _check(body)):
        raise damaged
    wire: _Wire = decode_msgpack(body, _Wire, damaged)
    sizes = (len(wire.authority_hash), len(wire.token_id), len(wire.secret))
    if sizes != (32, ID_BYTES, SECRET_BYTES) or not 0 < wire.expires_seconds < 1 << 33:
        raise damaged
    endpoints = check_endpoints(wire.endpoints, error=TokenError)
    if not endpoints:
        raise damaged
    return Token(
        network=check_name(wire.network, "network", error=TokenError),
        authority_hash=wire.authority_hash,
        endpoints=endpoints,
        token_id=wire.token_id.hex(),
        secret=Secret(wire.secret),
        expires_ns=wire.expires_seconds * SECOND,
    )


def _check(body: bytes) -> bytes:
    return hashlib.sha256(b"geomirror token v1\0" + body).digest()[:_CHECK_BYTES]


class TokenRecord(msgspec.Struct, kw_only=True, frozen=True):
    """What the authority keeps of a token. Times are Unix ns."""

    token_id: str
    secret_hash: str
    site: str
    node: str | None
    role: str
    created_ns: int
    expires_ns: int
    used_ns: int | None = None
    used_by: str | None = None
    """Node name given."""
    used_by_id: str | None = None
    """Node id that consumed it."""


def _secret_hash(token_id: str, secret: Secret) -> str:
    # A plain hash is enough: the secret has 256 bits, there is nothing to guess.
    data = b"geomirror token secret v1\0" + bytes.fromhex(token_id) + secret.reveal()
    return hashlib.sha256(data).hexdigest()


@dataclass
class TokenBook:
    """All records. Pure: the shell loads and stores it as one transaction under a lock."""

    records: dict[str, TokenRecord] = field(default_factory=dict)

    def create(
        self,
        *,
        network: str,
        authority_hash: bytes,
        endpoints: tuple[str, ...],
        site: str,
        node: str | None,
        role: str,
        expires_seconds: int,
        wall_ns: int,
        entropy: Entropy,
        limits: Limits,
    ) -> Token:
        """Add a record and return its token, the only place where the secret exists in the clear.

        :raises UsageError: unknown role, or an expiry outside 1 s … 30 days.
        :raises RefusedError: the book is full of tokens that are still valid.
        """
        if role not in TOKEN_ROLES:
            raise UsageError(f"a token cannot give this role; it may be {' or '.join(TOKEN_ROLES)}")
        if not EXPIRES_SECONDS_MIN <= expires_seconds <= EXPIRES_SECONDS_MAX:
            raise UsageError("--expires must be between 1 s and 30 days")
        check_name(site, "site", error=UsageError)
        if node is not None:
            check_name(node, "node", error=UsageError)
        self._make_room(wall_ns, limits)
        token = Token(
            network=network,
            authority_hash=authority_hash,
            endpoints=endpoints,
            token_id=entropy.token_bytes(ID_BYTES).hex(),
            secret=Secret(entropy.token_bytes(SECRET_BYTES)),
            expires_ns=(wall_ns // SECOND + expires_seconds) * SECOND,
        )
        self.records[token.token_id] = TokenRecord(
            token_id=token.token_id,
            secret_hash=_secret_hash(token.token_id, token.secret),
            site=site,
            node=node,
            role=role,
            created_ns=wall_ns,
            expires_ns=token.expires_ns,
        )
        return token

    def _make_room(self, wall_ns: int, limits: Limits) -> None:
        dead = [
            r for r in self.records.values() if r.used_ns is not None or wall_ns >= r.expires_ns
        ]
        dead.sort(key=lambda record: record.created_ns)
        for record in dead[: max(0, len(self.records) + 1 - limits.token_records_max)]:
            del self.records[record.token_id]
        if len(self.records) >= limits.token_records_max:
            raise RefusedError("too many unused join tokens", hint="wait until some have expired")

    def check(self, token_id: str, secret: Secret, node_id: str, wall_ns: int) -> TokenRecord:
        """Find the record that this secret may consume for this key.

        :raises TokenError: unknown, wrong, expired, or used by another key.
        """
        record = self.records.get(token_id)
        # Unknown ids are compared too: the time tells nobody which ids exist.
        expected = record.secret_hash if record else "0" * 64
        is_right = hmac.compare_digest(expected, _secret_hash(token_id, secret))
        if record is None or not is_right:
            raise TokenError("the join token is unknown to this network", hint=_NEW)
        if record.used_ns is not None and record.used_by_id != node_id:
            raise TokenError(
                f'the join token was already used, by the node "{record.used_by}"', hint=_NEW
            )
        if wall_ns >= record.expires_ns:
            seconds = (wall_ns - record.expires_ns) // SECOND
            raise TokenError(f"the join token expired {seconds} s ago", hint=_NEW)
        return record

    def consume(self, record: TokenRecord, name: str, node_id: str, wall_ns: int) -> None:
        """Mark the record used; must be durable before anything is given for it."""
        self.records[record.token_id] = msgspec.structs.replace(
            record, used_ns=wall_ns, used_by=name, used_by_id=node_id
        )

    def to_json(self) -> bytes:
        """The file's content."""
        return msgspec.json.encode(sorted(self.records.values(), key=lambda r: r.created_ns))

    @classmethod
    def from_json(cls, data: bytes) -> TokenBook:
        """Read the file back. :raises IntegrityError: it is not a token book."""
        damaged = IntegrityError("authority/tokens.json is damaged", hint="restore it")
        records: list[TokenRecord] = decode_json(data, list[TokenRecord], damaged)
        return cls({record.token_id: record for record in records})


DEFAULT_ROLE = ROLE_MEMBER
"""The role of a token made without `--role`."""
