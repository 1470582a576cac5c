"""The hello: what this node says first on a connection, and what it accepts of a peer.

Features are names; both sides use those that both know. There are none yet.
"""

from __future__ import annotations

from geomirror.errors import RemoteProtocolError, VersionError
from geomirror.limits import Limits
from geomirror.tunnel.link_path import RANK_MAX
from geomirror.wan_protocol.frame import KIND_MESSAGE, Packet
from geomirror.wan_protocol.messages import (
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_MIN,
    Hello,
    decode_message,
)

FEATURES: list[str] = []
CONTROL_INDEX = -1


def make_hello(
    node: str,
    incarnation: bytes,
    link: bytes,
    index: int,
    wall_ns: int,
    after: bytes,
    rank: int = 0,
) -> Hello:
    """The hello of connection `index` of a set; −1 is the control connection.

    :param after: the set that this node used last, if it uses none now.
    :param rank: of the path that this node has dialled.
    """
    return Hello(
        version=PROTOCOL_VERSION,
        version_min=PROTOCOL_VERSION_MIN,
        features=FEATURES,
        node=node,
        incarnation=incarnation,
        link=link,
        role="control" if index == CONTROL_INDEX else "data",
        index=index,
        wall_ns=wall_ns,
        after=after,
        rank=rank,
    )


def read_hello(packet: Packet, peer: str, limits: Limits) -> Hello:
    """Check the first packet of a connection.

    :param peer: who the link driver says is there.
    :raises VersionError: no version in common.
    :raises RemoteProtocolError: not a hello, of another node, or with impossible fields.
    """
    if packet.kind != KIND_MESSAGE:
        raise RemoteProtocolError("the first packet is not a hello")
    hello = decode_message(packet.body)
    if not isinstance(hello, Hello):
        raise RemoteProtocolError("the first message is not a hello")
    if hello.node != peer:
        raise RemoteProtocolError(f'hello of "{hello.node[:64]}" on a connection of "{peer}"')
    if hello.version_min > PROTOCOL_VERSION or hello.version < PROTOCOL_VERSION_MIN:
        raise VersionError(
            f"peer speaks versions {hello.version_min} to {hello.version}, "
            f"this node {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION}"
        )
    is_control = hello.role == "control" and hello.index == CONTROL_INDEX
    is_data = hello.role == "data" and 0 <= hello.index < limits.data_connections_max
    is_named = len(hello.link) == len(hello.incarnation) == 16 and len(hello.after) in (0, 16)
    is_ranked = 0 <= hello.rank <= RANK_MAX
    if not is_named or not is_ranked or not (is_control or is_data):
        raise RemoteProtocolError("hello with impossible fields")
    return hello
