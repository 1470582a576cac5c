"""What a node keeps of its network: loaded from the data directory, changed only through here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509

from geomirror.errors import AuthError, IntegrityError, NotFoundError, RefusedError
from geomirror.limits import PRODUCTION, Limits
from geomirror.tunnel.authority import (
    CERTIFICATE_RENEWAL_NS,
    CERTIFICATE_SKEW_NS,
    Authority,
    certificate_pem,
)
from geomirror.tunnel.certificates import (
    Claims,
    check_issued_by,
    load_certificate,
    public_key_of,
    read_claims,
)
from geomirror.tunnel.decoding import convert, decode_json
from geomirror.tunnel.enrollment import Enrolled
from geomirror.tunnel.identity import NodeIdentity, key_from_pem, key_hash
from geomirror.tunnel.key_files_io import locked, make_directory, read_file, write_file
from geomirror.tunnel.membership import Member, Membership, Signed

FORMAT = 1


class NetworkFile(msgspec.Struct, kw_only=True):
    """`network/network.json`; written last, so that its existence means a complete network."""

    format: int
    network: str
    range: str
    listen: str | None


@dataclass
class NetworkState:
    """This node in its network. Used on the event loop; the files are the truth for others."""

    data_dir: Path
    network: str
    range: str
    """Virtual addresses, CIDR."""
    listen: str | None
    """Endpoint given at `network create` or `join`; None for a node that only dials out."""
    identity: NodeIdentity
    certificate: x509.Certificate
    authority_certificate: x509.Certificate
    membership: Membership
    authority: Authority | None
    """Set on a node that holds the authority's key."""
    limits: Limits
    _is_stored: bool = True
    """Whether the file has what `membership` has."""

    @property
    def claims(self) -> Claims:
        """What our certificate says."""
        return read_claims(self.certificate)

    @property
    def node(self) -> str:
        """Our name: the newest that the authority gave, also before the certificate has it."""
        member = self.membership.by_id(self.identity.node_id)
        return member.name if member else self.claims.name

    @property
    def site(self) -> str:
        """Our site."""
        return self.claims.site

    @property
    def authority_hash(self) -> bytes:
        """How tokens name this network's authority."""
        return key_hash(public_key_of(self.authority_certificate))

    @property
    def certificate_path(self) -> Path:
        """Our certificate, for the TLS context."""
        return self.data_dir / "identity" / "node.crt"

    @property
    def key_path(self) -> Path:
        """Our private key, for the TLS context."""
        return self.data_dir / "identity" / "node.key"

    @property
    def lock_path(self) -> Path:
        """Held while the authority's or the membership's files are changed."""
        return self.data_dir / "network" / "lock"

    @property
    def tokens_path(self) -> Path:
        """The authority's book of tokens."""
        return self.data_dir / "authority" / "tokens.json"

    @property
    def membership_path(self) -> Path:
        """The signed entries."""
        return self.data_dir / "network" / "membership.json"

    def authority_names(self) -> list[str]:
        """Nodes that hold the authority's key."""
        return [m.name for m in self.membership.active() if "authority" in m.roles]

    def require_authority(self) -> Authority:
        """The authority's key. :raises RefusedError: it is not here; the message says where."""
        if self.authority is None:
            names = ", ".join(f'"{name}"' for name in self.authority_names()) or "no known node"
            raise RefusedError(
                f'the node "{self.node}" does not hold the key of the network authority',
                hint=f"run this command on {names}",
            )
        return self.authority

    def is_renewal_due(self, wall_ns: int) -> bool:
        """Whether half of our certificate's life is over, or its name is out of date."""
        claims = self.claims
        age_ns = wall_ns - claims.not_before_ns - CERTIFICATE_SKEW_NS
        return age_ns >= CERTIFICATE_RENEWAL_NS or claims.name != self.node

    def install_certificate(self, certificate: x509.Certificate) -> None:
        """Use a checked new certificate, durably; the TLS driver reloads it by itself."""
        write_file(self.certificate_path, certificate_pem(certificate).encode("ascii"))
        self.certificate = certificate

    def export_updates(self) -> list[dict[str, Any]]:
        """Everything known of the members, for `apply_updates` on another node."""
        found: list[dict[str, Any]] = msgspec.to_builtins(self.membership.updates())
        return found

    def apply_updates(self, updates: Sequence[dict[str, Any]]) -> bool:
        """Take over newer entries from another node, durably.

        :returns: whether anything changed; then routes, peers and live sessions must be looked at.
        :raises AuthError: malformed or not signed by the authority; nothing changed.
        """
        unreadable = AuthError("membership entries cannot be read")
        entries: list[Signed] = convert(updates, list[Signed], unreadable)
        is_changed = self.membership.merge(entries)
        if is_changed or not self._is_stored:
            # In force at once, also where the disk is full; then it is stored with the next one.
            self._is_stored = False
            with locked(self.lock_path):
                self.membership.merge(load_membership(self).updates())
                write_file(self.membership_path, self.membership.to_json())
            self._is_stored = True
        return is_changed


def load_network(data_dir: Path, limits: Limits = PRODUCTION) -> NetworkState:
    """Load this node's network.

    :raises NotFoundError: there is none yet.
    :raises ConfigError: a file's mode is too wide.
    :raises IntegrityError: a file is damaged, or the files do not fit each other.
    """
    path = data_dir / "network" / "network.json"
    try:
        data = read_file(path)
    except NotFoundError:
        raise NotFoundError(
            f"{data_dir} belongs to no network yet",
            hint='run "geomirror network create NAME --site SITE" or "geomirror join TOKEN"',
        ) from None
    damaged = IntegrityError(f"{path} is damaged", hint="restore it")
    file: NetworkFile = decode_json(data, NetworkFile, damaged)
    if file.format != FORMAT:
        raise IntegrityError(f"{path} has format {file.format}, this version reads {FORMAT}")
    key_path = data_dir / "identity" / "node.key"
    identity = NodeIdentity.from_pem(read_file(key_path), name=str(key_path))
    certificate = _load_certificate(data_dir / "identity" / "node.crt")
    root = _load_certificate(data_dir / "identity" / "authority.crt")
    try:
        check_issued_by(certificate, root)
        is_ours = read_claims(certificate).node_id == identity.node_id
    except AuthError as error:
        raise IntegrityError(f"identity/node.crt: {error.message}", hint="restore it") from None
    if not is_ours:
        raise IntegrityError("identity/node.crt is not for identity/node.key", hint="restore them")
    state = NetworkState(
        data_dir=data_dir,
        network=file.network,
        range=file.range,
        listen=file.listen,
        identity=identity,
        certificate=certificate,
        authority_certificate=root,
        membership=Membership(file.network, public_key_of(root), limits),
        authority=_load_authority(data_dir, root, file.network),
        limits=limits,
    )
    state.membership = load_membership(state)
    return state


def load_membership(state: NetworkState) -> Membership:
    """The membership as it is in the file now. :raises IntegrityError: damaged."""
    path = state.membership_path
    key = public_key_of(state.authority_certificate)
    try:
        return Membership.from_json(read_file(path), state.network, key, state.limits)
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error.message}", hint="restore it") from None


def _load_certificate(path: Path) -> x509.Certificate:
    data = read_file(path)
    try:
        return load_certificate(data)
    except AuthError as error:
        raise IntegrityError(f"{path}: {error.message}", hint="restore it") from None


def _load_authority(data_dir: Path, root: x509.Certificate, network: str) -> Authority | None:
    path = data_dir / "authority" / "authority.key"
    try:
        pem = read_file(path)
    except NotFoundError:
        return None
    authority = Authority(key_from_pem(pem, name=str(path)), root, network)
    if key_hash(authority.public_key) != key_hash(public_key_of(root)):
        raise IntegrityError(f"{path} is not the key of identity/authority.crt", hint="restore it")
    return authority


def leaving_path(data_dir: Path) -> Path:
    """There from the moment when a node has begun to leave until nothing of it is left."""
    return data_dir / "leaving.json"


def check_staying(data_dir: Path) -> None:
    """:raises RefusedError: the node of this data directory has begun to leave its network."""
    if leaving_path(data_dir).exists():
        raise RefusedError(
            f"the node in {data_dir} is leaving its network",
            hint=f'"geomirror --data-dir {data_dir} node leave" removes what is left of it',
        )


def check_unused(data_dir: Path) -> None:
    """:raises RefusedError: the data directory belongs to a network already, or still."""
    check_staying(data_dir)
    if (data_dir / "network" / "network.json").exists():
        raise RefusedError(
            f"{data_dir} already belongs to a network", hint="use another --data-dir"
        )


def keep_identity(data_dir: Path, identity: NodeIdentity) -> None:
    """Store the private key."""
    make_directory(data_dir / "identity")
    write_file(data_dir / "identity" / "node.key", identity.to_pem())


def keep_network(
    data_dir: Path,
    enrolled: Enrolled,
    identity: NodeIdentity,
    *,
    listen: str | None,
    authority: Authority | None,
    limits: Limits = PRODUCTION,
) -> NetworkState:
    """Store everything of a network just created or joined; complete or not visible at all."""
    make_directory(data_dir / "network")
    state = NetworkState(
        data_dir=data_dir,
        network=enrolled.network,
        range=enrolled.range,
        listen=listen,
        identity=identity,
        certificate=enrolled.certificate,
        authority_certificate=enrolled.authority,
        membership=enrolled.membership,
        authority=authority,
        limits=limits,
    )
    keep_identity(data_dir, identity)
    root_pem = certificate_pem(enrolled.authority).encode("ascii")
    write_file(data_dir / "identity" / "authority.crt", root_pem)
    write_file(state.certificate_path, certificate_pem(enrolled.certificate).encode("ascii"))
    if authority is not None:
        make_directory(data_dir / "authority")
        write_file(data_dir / "authority" / "authority.key", authority.key_pem())
        write_file(state.tokens_path, b"[]")
    write_file(state.membership_path, enrolled.membership.to_json())
    file = NetworkFile(format=FORMAT, network=state.network, range=state.range, listen=listen)
    write_file(data_dir / "network" / "network.json", msgspec.json.encode(file))
    return state


def own_member(state: NetworkState) -> Member:
    """Our own entry. :raises IntegrityError: the membership does not list us."""
    member = state.membership.by_id(state.identity.node_id)
    if member is None:
        raise IntegrityError("network/membership.json does not list this node", hint="restore it")
    return member
