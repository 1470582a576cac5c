"""Who is in the network: entries signed by the authority, and the signed list of revoked keys.

    Membership = { node id → newest signed Member }   +   newest signed Revocations (numbered)

Every change by the authority gets the next version of the whole network, so the newest wins. Where
an authority that was put back from a backup gave one version twice, the greater text does: what
wins is total, so merging is commutative, and nodes that saw the same entries, in any order, hold
the same state. A signature is checked over the very bytes that were signed; nothing is re-encoded.

Not done here: who may sign (there is one authority key), and files.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from geomirror.errors import AuthError, IntegrityError
from geomirror.limits import Limits
from geomirror.tunnel.authority import Authority
from geomirror.tunnel.decoding import decode_json

_MEMBER = b"geomirror member v1\0"
_REVOCATIONS = b"geomirror revocations v1\0"


class Member(msgspec.Struct, kw_only=True, frozen=True):
    """One node, as the authority describes it."""

    network: str
    node_id: str
    name: str
    site: str
    roles: tuple[str, ...]
    endpoints: tuple[str, ...]
    """`HOST:PORT` hints; empty for a node that only dials out. Never trusted, only tried."""
    address: str
    """Virtual IPv4 address, derived from the key."""
    serial: str
    """Serial number of the certificate given at enrolment, hex; renewals do not change it."""
    version: int
    """Version of the network that this entry made; newest wins."""
    revoked: bool = False


class Revoked(msgspec.Struct, frozen=True):
    """One revoked key. By key, not by certificate: every certificate of it is void."""

    node_id: str
    name: str
    wall_ns: int
    is_left: bool = False
    """It has left by itself; nobody took its right away."""


class Revocations(msgspec.Struct, frozen=True):
    """The whole list; a higher number replaces a lower one, never the other way round."""

    network: str
    number: int
    revoked: tuple[Revoked, ...]


class Signed(msgspec.Struct, frozen=True):
    """`kind` is "member" or "revocations"; `payload` is the exact JSON text that was signed."""

    kind: str
    payload: str
    signature: str


def sign_member(authority: Authority, member: Member) -> Signed:
    """An entry that every node accepts."""
    return _sign(authority, "member", _MEMBER, msgspec.json.encode(member))


def sign_revocations(authority: Authority, revocations: Revocations) -> Signed:
    """A list that every node accepts."""
    return _sign(authority, "revocations", _REVOCATIONS, msgspec.json.encode(revocations))


def _sign(authority: Authority, kind: str, prefix: bytes, payload: bytes) -> Signed:
    signature = base64.b64encode(authority.sign(prefix + payload)).decode("ascii")
    return Signed(kind, payload.decode("utf-8"), signature)


_Payload = TypeVar("_Payload", Member, Revocations)


class Membership:
    """The members and the revocation list that this node knows."""

    def __init__(self, network: str, authority_key: Ed25519PublicKey, limits: Limits) -> None:
        self.network = network
        self._key = authority_key
        self._limits = limits
        self._members: dict[str, tuple[Member, Signed]] = {}
        self._revocations = Revocations(network, 0, ())
        self._signed_revocations: Signed | None = None

    @property
    def version(self) -> int:
        """The newest version seen; 0 when empty."""
        return max((member.version for member, _ in self._members.values()), default=0)

    @property
    def revocations(self) -> Revocations:
        """The newest revocation list seen."""
        return self._revocations

    def members(self) -> list[Member]:
        """All entries, revoked ones too, sorted by name."""
        found = [member for member, _ in self._members.values()]
        return sorted(found, key=lambda member: (member.name, member.version))

    def active(self) -> list[Member]:
        """The members that are not revoked, sorted by name."""
        return [m for m in self.members() if not m.revoked and not self.is_revoked(m.node_id)]

    def find(self, name: str) -> Member | None:
        """The active member of exactly this name."""
        return next((m for m in self.active() if m.name == name), None)

    def find_similar(self, name: str) -> Member | None:
        """The active member whose name differs at most in case."""
        folded = name.casefold()
        return next((m for m in self.active() if m.name.casefold() == folded), None)

    def by_id(self, node_id: str) -> Member | None:
        """The entry of a key, revoked or not."""
        entry = self._members.get(node_id)
        return entry[0] if entry else None

    def is_revoked(self, node_id: str) -> bool:
        """Whether a key is revoked, by the list or by its entry."""
        entry = self._members.get(node_id)
        if entry is not None and entry[0].revoked:
            return True
        return any(item.node_id == node_id for item in self._revocations.revoked)

    def revoked_names(self) -> list[str]:
        """Names whose sessions must end: revoked, and not given to another node since."""
        active = {member.name for member in self.active()}
        names = {m.name for m in self.members() if self.is_revoked(m.node_id)}
        names.update(item.name for item in self._revocations.revoked)
        return sorted(names - active)

    def updates(self) -> list[Signed]:
        """Everything known, for another node's `merge`."""
        ordered = sorted(
            self._members.values(), key=lambda entry: (entry[0].version, entry[1].payload)
        )
        found = [self._signed_revocations] if self._signed_revocations else []
        return found + [signed for _, signed in ordered]

    def fingerprint(self) -> bytes:
        """32 bytes that are equal at two nodes exactly when they hold the same records."""
        return fingerprint_of(self.updates())

    def digest(self) -> tuple[int, int]:
        """(version, revocation number): equal digests of two nodes mean nothing to exchange."""
        return self.version, self._revocations.number

    def merge(self, updates: Sequence[Signed]) -> bool:
        """Take over what is newer; all or nothing.

        :returns: whether anything changed.
        :raises AuthError: an entry is not signed by the authority or not of this network.
        """
        members: list[tuple[Member, Signed]] = []
        revocations: list[tuple[Revocations, Signed]] = []
        for signed in updates:
            if signed.kind == "member":
                member = self._open(signed, _MEMBER, Member)
                members.append((member, signed))
            else:
                revocations.append((self._open(signed, _REVOCATIONS, Revocations), signed))
        merged = dict(self._members)
        for member, signed in members:
            known = merged.get(member.node_id)
            if known is None or _rank(member.version, signed) > _rank(known[0].version, known[1]):
                merged[member.node_id] = (member, signed)
        # Revoked entries stay, so there may be more entries than the `peers_max` active nodes.
        if len(merged) > 4 * self._limits.peers_max:
            raise AuthError(f"more than {len(merged) - 1} membership entries")
        is_changed = merged != self._members
        self._members = merged
        for item, signed in revocations:
            known_list = self._signed_revocations
            number = self._revocations.number
            if known_list is None or _rank(item.number, signed) > _rank(number, known_list):
                self._revocations, self._signed_revocations = item, signed
                is_changed = True
        return is_changed

    def _open(self, signed: Signed, prefix: bytes, kind: type[_Payload]) -> _Payload:
        payload = signed.payload.encode("utf-8", "surrogatepass")
        unsigned = AuthError("a membership entry is not signed by the authority")
        try:
            signature = base64.b64decode(signed.signature, validate=True)
            self._key.verify(signature, prefix + payload)
        except (InvalidSignature, ValueError):
            raise unsigned from None
        item: _Payload = decode_json(payload, kind, unsigned)
        if item.network != self.network:
            raise AuthError("a membership entry belongs to another network")
        return item

    def to_json(self) -> bytes:
        """The file's content."""
        return msgspec.json.format(msgspec.json.encode(self.updates()), indent=1)

    @classmethod
    def from_json(
        cls, data: bytes, network: str, authority_key: Ed25519PublicKey, limits: Limits
    ) -> Membership:
        """Read a file back, checking every signature. :raises IntegrityError: damaged."""
        membership = cls(network, authority_key, limits)
        try:
            membership.merge(decode_updates(data))
        except AuthError as error:
            raise IntegrityError(f"the membership file is damaged: {error.message}") from None
        return membership


def _rank(version: int, signed: Signed) -> tuple[int, int, str]:
    """Which of two records of one thing holds. A longer list of revoked keys has more of them."""
    return version, len(signed.payload), signed.payload


def fingerprint_of(updates: Iterable[Signed]) -> bytes:
    """Of records in any order. Signatures are not part of it: they say nothing more."""
    found = hashlib.sha256(b"geomirror records v1\0")
    for text in sorted(f"{signed.kind}\0{signed.payload}" for signed in updates):
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()


def decode_updates(data: bytes) -> list[Signed]:
    """Parse entries. :raises AuthError: malformed."""
    unreadable = AuthError("membership entries cannot be read")
    entries: list[Signed] = decode_json(data, list[Signed], unreadable)
    return entries
