"""What a node remembers for its tunnels: its key, its neighbours' records, and what it has added.

    private key ── one for the node
    neighbours  ── node id → our port and share for it, its record, when it was last confirmed
    addresses, hosts_file ── what cannot carry our name and has to be taken away again

Ports and shares stay over restarts, so that a restarted node is answered at once. A neighbour's
record is confirmed whenever it is told again over a link, which only a node with a valid
certificate has. One that was not for as long as certificates live is no longer used: a node that
the network does not know any more is out after a day even where its revocation did not arrive.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from geomirror.environment import Entropy
from geomirror.errors import AuthError, IntegrityError, RefusedError
from geomirror.limits import PRODUCTION
from geomirror.tunnel.authority import CERTIFICATE_LIFETIME_NS
from geomirror.tunnel.decoding import decode_json
from geomirror.tunnel.token import Secret
from geomirror.tunnel.wireguard_keys import (
    KEY_BYTES,
    KeyRecord,
    key_bytes,
    key_text,
    new_private_key,
    public_key_of,
)

FORMAT = 1


class Neighbour(msgspec.Struct, kw_only=True):
    """One neighbour; what it has told us is empty until then."""

    port: int
    share: bytes
    public_key: str = ""
    peer_port: int = 0
    peer_share: bytes = b""
    confirmed_ns: int = 0
    """Wall clock."""

    def __repr__(self) -> str:
        return f"Neighbour(port={self.port}, public_key={self.public_key!r})"

    def is_usable(self, wall_ns: int) -> bool:
        """Whether its key is known and was confirmed within a certificate's life."""
        return bool(self.public_key) and wall_ns - self.confirmed_ns < CERTIFICATE_LIFETIME_NS


class _File(msgspec.Struct, kw_only=True):
    format: int
    private_key: bytes
    neighbours: dict[str, Neighbour]
    addresses: list[str]
    hosts_file: str

    def __repr__(self) -> str:
        return "_File(hidden)"


class TunnelBook:
    """The content of `tunnel/wireguard.json`; the shell stores it after every change."""

    def __init__(self, private_key: Secret) -> None:
        assert len(private_key.reveal()) == KEY_BYTES
        self.private_key = private_key
        self.public_key = public_key_of(private_key)
        self.neighbours: dict[str, Neighbour] = {}
        self.addresses: list[str] = []
        """Addresses on the loopback device that are ours; here before they are there."""
        self.hosts_file = ""
        """File that has our block, or is about to."""

    @classmethod
    def create(cls, entropy: Entropy) -> TunnelBook:
        """An empty one with a new key."""
        return cls(new_private_key(entropy))

    def to_json(self) -> bytes:
        """The file's content: secret."""
        file = _File(
            format=FORMAT,
            private_key=self.private_key.reveal(),
            neighbours=self.neighbours,
            addresses=self.addresses,
            hosts_file=self.hosts_file,
        )
        return msgspec.json.encode(file)

    @classmethod
    def from_json(cls, data: bytes, path: str) -> TunnelBook:
        """Read the file back. :raises IntegrityError: damaged; the message does not quote it."""
        damaged = IntegrityError(
            f"{path} is damaged", hint="delete it: the node makes a new key and tells the others"
        )
        file: _File = decode_json(data, _File, damaged)
        if file.format != FORMAT or len(file.private_key) != KEY_BYTES:
            raise damaged
        book = cls(Secret(file.private_key))
        book.neighbours, book.addresses = file.neighbours, file.addresses
        book.hosts_file = file.hosts_file
        return book

    def rotate(self, entropy: Entropy) -> None:
        """A new key, and a new share for each neighbour; ports and what they told us stay."""
        self.private_key = new_private_key(entropy)
        self.public_key = public_key_of(self.private_key)
        for node_id in sorted(self.neighbours):
            self.neighbours[node_id].share = entropy.token_bytes(KEY_BYTES)

    def own_record(self, node_id: str, first_port: int, entropy: Entropy) -> KeyRecord:
        """What to tell a neighbour; the first time it gets a port and a share, then the same ones.

        :raises RefusedError: all ports from `first_port` on are given away.
        """
        neighbour = self.neighbours.get(node_id)
        if neighbour is None:
            share = entropy.token_bytes(KEY_BYTES)
            neighbour = Neighbour(port=self._free_port(first_port), share=share)
            self.neighbours[node_id] = neighbour
        elif not 0 <= neighbour.port - first_port < PRODUCTION.tunnel_ports_max:
            neighbour.port = self._free_port(first_port)
        return KeyRecord(
            public_key=self.public_key, port=neighbour.port, share=key_text(neighbour.share)
        )

    def learn(self, node_id: str, record: KeyRecord, wall_ns: int) -> bool:
        """Take over a neighbour's record, after `own_record` for it.

        :returns: whether anything but the time of it is new.
        :raises AuthError: it claims our own key.
        """
        if record.public_key == self.public_key:
            raise AuthError("a neighbour claims this node's WireGuard key")
        neighbour = self.neighbours[node_id]
        share = key_bytes(record.share)
        is_new = (neighbour.public_key, neighbour.peer_port, neighbour.peer_share) != (
            record.public_key,
            record.port,
            share,
        ) or not neighbour.is_usable(wall_ns)
        neighbour.public_key, neighbour.peer_port = record.public_key, record.port
        neighbour.peer_share, neighbour.confirmed_ns = share, wall_ns
        return is_new

    def forget_all_but(self, node_ids: Iterable[str]) -> bool:
        """Forget the keys of nodes that are no members any more; whether there were any."""
        kept = set(node_ids)
        gone = [node_id for node_id in self.neighbours if node_id not in kept]
        for node_id in gone:
            del self.neighbours[node_id]
        return bool(gone)

    def _free_port(self, first_port: int) -> int:
        taken = {neighbour.port for neighbour in self.neighbours.values()}
        end = min(first_port + PRODUCTION.tunnel_ports_max, 65536)
        for port in range(first_port, end):
            if port not in taken:
                return port
        raise RefusedError(
            f"no UDP port from {first_port} on is left for another neighbour",
            hint="set [tunnel] port lower",
        )
