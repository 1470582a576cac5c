"""What a node with the authority's key does to its records, each as one transaction.

Every function locks, reads the records as they are on disk (a command and the daemon may both be at
work), decides with the pure `Desk` or `TokenBook`, writes them durably, and only then returns. They
block for a few fsyncs: the daemon calls `enroll` and `renew_expired` on a worker thread, where they
touch nothing of the state but its paths and keys; the caller merges the returned entries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from geomirror.environment import Entropy, SystemEntropy
from geomirror.errors import AuthError, NotFoundError, RefusedError
from geomirror.tunnel.certificates import ROLE_AUTHORITY
from geomirror.tunnel.decoding import convert
from geomirror.tunnel.enrollment import (
    Desk,
    Join,
    Renew,
    Welcome,
    check_own_certificate,
)
from geomirror.tunnel.identity import node_id_of, read_request
from geomirror.tunnel.key_files_io import locked, read_file, write_file
from geomirror.tunnel.membership import (
    Member,
    Revocations,
    Revoked,
    Signed,
    sign_member,
    sign_revocations,
)
from geomirror.tunnel.names import check_endpoints, check_name
from geomirror.tunnel.network_state_io import NetworkState, load_membership, own_member
from geomirror.tunnel.token import DEFAULT_ROLE, TokenBook, TokenRecord


@contextlib.contextmanager
def _desk(state: NetworkState) -> Iterator[Desk]:
    authority = state.require_authority()
    with locked(state.lock_path):
        yield Desk(
            authority=authority,
            book=TokenBook.from_json(read_file(state.tokens_path)),
            membership=load_membership(state),
            range=state.range,
            limits=state.limits,
        )


def _keep_book(state: NetworkState, desk: Desk) -> None:
    write_file(state.tokens_path, desk.book.to_json())


def _keep_membership(state: NetworkState, desk: Desk) -> None:
    write_file(state.membership_path, desk.membership.to_json())


def create_token(
    state: NetworkState,
    *,
    site: str,
    node: str | None = None,
    role: str = DEFAULT_ROLE,
    expires_seconds: int = 3600,
    wall_ns: int,
    endpoints: Sequence[str] = (),
    entropy: Entropy | None = None,
) -> str:
    """A new join token, durable at the authority before it is returned.

    :param endpoints: where the joiner finds this node; empty: as the network knows them.
    :returns: the text to print; the only place where its secret exists.
    :raises RefusedError: no authority key here, the name is taken, or this node does not listen.
    :raises UsageError: a name, role or expiry is not acceptable.
    """
    state.require_authority()
    dialable = check_endpoints(endpoints) or own_member(state).endpoints
    if not dialable:
        raise RefusedError(
            f'the node "{state.node}" does not listen, so nobody could join',
            hint='set "listen" in its configuration file',
        )
    with _desk(state) as desk:
        similar = desk.membership.find_similar(node) if node is not None else None
        if similar is not None:
            raise RefusedError(
                f'the network already has a node named "{similar.name}"',
                hint="choose another --node",
            )
        token = desk.book.create(
            network=state.network,
            authority_hash=state.authority_hash,
            endpoints=dialable,
            site=site,
            node=node,
            role=role,
            expires_seconds=expires_seconds,
            wall_ns=wall_ns,
            entropy=entropy or SystemEntropy(),
            limits=state.limits,
        )
        _keep_book(state, desk)
    return token.to_text()


def list_tokens(state: NetworkState) -> list[TokenRecord]:
    """All records, oldest first, used and expired ones included: the audit of who came how."""
    with _desk(state) as desk:
        return sorted(desk.book.records.values(), key=lambda record: record.created_ns)


def revoke_token(state: NetworkState, token_id: str) -> None:
    """Forget an unused token. :raises NotFoundError: no such token."""
    with _desk(state) as desk:
        record = desk.book.records.get(token_id)
        if record is None or record.used_ns is not None:
            raise NotFoundError(f'no unused token "{token_id[:16]}"', hint="see token list")
        del desk.book.records[token_id]
        _keep_book(state, desk)


def enroll(
    state: NetworkState, request: Join, *, observed_host: str, wall_ns: int, entropy: Entropy
) -> Welcome:
    """Consume a token and admit its node. Blocking; see `Desk.join` for the errors.

    The token is durable as used before the member is, and both before the certificate is returned:
    a crash in between loses the answer, and the same key may ask again.
    """
    with _desk(state) as desk:
        welcome = desk.join(request, observed_host=observed_host, wall_ns=wall_ns, entropy=entropy)
        _keep_book(state, desk)
        _keep_membership(state, desk)
        return welcome


def renew_expired(
    state: NetworkState,
    request: Renew,
    *,
    nonce: bytes,
    leaf_der: bytes,
    wall_ns: int,
    entropy: Entropy,
) -> Welcome:
    """Renew for a member that proves its key without a valid certificate. Blocking."""
    with _desk(state) as desk:
        return desk.renew(request, nonce, leaf_der, wall_ns=wall_ns, entropy=entropy)


def renew(
    state: NetworkState, peer: str, parameters: dict[str, Any], *, wall_ns: int, entropy: Entropy
) -> dict[str, Any]:
    """Answer a `renewal_request` that came over the authenticated link of `peer`.

    :raises RefusedError: no authority key here.
    :raises AuthError: the request is not for the key that the network knows as `peer`.
    """
    key = read_request(str(parameters.get("request", "")))
    with _desk(state) as desk:
        member = desk.member_of(key)
        # During a rename the link still has the old name; the key is what counts.
        claimed = desk.membership.find(peer)
        if claimed is not None and claimed.node_id != node_id_of(key):
            raise AuthError(f'the request to renew is not for the key of "{peer}"')
        found: dict[str, Any] = msgspec.to_builtins(
            desk.issue_to(key, member, wall_ns, entropy), str_keys=True
        )
        return found


def renewal_request(state: NetworkState) -> dict[str, Any]:
    """Parameters for `renew` on a node of `state.authority_names()`."""
    return {"request": state.identity.request_pem()}


def install_renewal(state: NetworkState, reply: dict[str, Any], *, wall_ns: int) -> None:
    """Check and use what `renew` answered. :raises AuthError: it does not fit; nothing changed."""
    unreadable = AuthError("the answer to a request to renew cannot be read")
    welcome: Welcome = convert(reply, Welcome, unreadable)
    install_welcome(state, welcome, wall_ns=wall_ns)


def install_welcome(state: NetworkState, welcome: Welcome, *, wall_ns: int) -> None:
    """Use a renewed certificate and what came with it."""
    certificate = check_own_certificate(
        welcome.certificate, state.authority_certificate, state.identity, state.network, wall_ns
    )
    state.apply_updates(msgspec.to_builtins(welcome.members))
    state.install_certificate(certificate)


def renew_own(state: NetworkState, *, wall_ns: int, entropy: Entropy) -> None:
    """Renew the certificate of a node that holds the authority's key itself."""
    with _desk(state) as desk:
        key = state.identity.public_key
        welcome = desk.issue_to(key, desk.member_of(key), wall_ns, entropy)
    install_welcome(state, welcome, wall_ns=wall_ns)


def _change(state: NetworkState, desk: Desk, entries: list[Signed]) -> None:
    desk.membership.merge(entries)
    _keep_membership(state, desk)
    state.membership.merge(desk.membership.updates())


def _find(desk: Desk, node: str) -> Member:
    member = desk.membership.find(node)
    if member is None:
        raise NotFoundError(
            f'no node "{node[:64]}" in the network', hint='see "geomirror node list"'
        )
    return member


def rename_node(state: NetworkState, node: str, new_name: str) -> Member:
    """Give a member another name; its certificate follows with the next renewal.

    :raises NotFoundError: no such node. :raises RefusedError: the name is taken.
    """
    check_name(new_name, "node")
    with _desk(state) as desk:
        member = _find(desk, node)
        similar = desk.membership.find_similar(new_name)
        if similar is not None and similar.node_id != member.node_id:
            raise RefusedError(f'the network already has a node named "{similar.name}"')
        changed = msgspec.structs.replace(
            member, name=new_name, version=desk.membership.version + 1
        )
        _change(state, desk, [sign_member(desk.authority, changed)])
        return changed


def revoke_node(state: NetworkState, node: str, *, wall_ns: int, is_left: bool = False) -> Member:
    """Revoke a member's key, durably and for ever; its name becomes free.

    The caller spreads `state.export_updates()` and calls the driver's `enforce`.

    :param is_left: the node itself asks for it, because it leaves.
    :raises NotFoundError: no such node. :raises RefusedError: it holds the authority's key.
    """
    with _desk(state) as desk:
        member = _find(desk, node)
        if ROLE_AUTHORITY in member.roles:
            raise RefusedError(
                f'the node "{node}" holds the key of the authority and cannot be revoked',
                hint="create a new network if that key was stolen",
            )
        changed = msgspec.structs.replace(member, revoked=True, version=desk.membership.version + 1)
        known = desk.membership.revocations
        gone = Revoked(member.node_id, member.name, wall_ns, is_left)
        revoked = (*known.revoked, gone)
        revocations = Revocations(state.network, known.number + 1, revoked)
        entries = [
            sign_member(desk.authority, changed),
            sign_revocations(desk.authority, revocations),
        ]
        _change(state, desk, entries)
        return changed


def set_endpoints(state: NetworkState, node: str, endpoints: Sequence[str]) -> Member:
    """Replace the endpoints that the network knows for a node."""
    dialable = check_endpoints(endpoints)
    with _desk(state) as desk:
        member = _find(desk, node)
        if member.endpoints == dialable:
            return member
        changed = msgspec.structs.replace(
            member, endpoints=dialable, version=desk.membership.version + 1
        )
        _change(state, desk, [sign_member(desk.authority, changed)])
        return changed
