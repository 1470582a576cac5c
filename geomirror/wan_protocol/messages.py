"""Every control message of the WAN protocol, with its fields. Bodies are MessagePack (msgspec).

Added fields come last and have defaults: a peer of the previous version omits or ignores them.
"""

from __future__ import annotations

import msgspec

from geomirror.cluster.standing import Standing
from geomirror.errors import RemoteProtocolError
from geomirror.wan_protocol.message import Message as Message
from geomirror.wan_protocol.verify_messages import VerifyAnswer as VerifyAnswer
from geomirror.wan_protocol.verify_messages import VerifyAsk as VerifyAsk
from geomirror.wan_protocol.verify_messages import VerifyPin as VerifyPin

PROTOCOL_VERSION = 1
PROTOCOL_VERSION_MIN = 1


class Hello(Message, frozen=True):
    """First message on every connection, both ways."""

    version: int
    version_min: int
    features: list[str]
    node: str
    incarnation: bytes
    """16 random bytes, new at each start of the daemon."""
    link: bytes
    """16 random bytes chosen by the dialling side: names the set that this connection joins."""
    role: str
    """`control` or `data`."""
    index: int
    """Number of the data connection, from 0."""
    wall_ns: int
    after: bytes = b""
    """The set that the sender used last, empty if it uses one now, or never did. Its peer must not
    go on with it."""
    rank: int = 0
    """How good the path of a control connection is to the dialling node; 0 is the best. The node
    that leads moves from a set to one of a better rank."""


class Use(Message, frozen=True):
    """From the node with the smaller name, once on a control connection, before anything of a
    session: this set is used from now on, and no other."""

    number: int
    """Grows with each choice since the start of the daemon; a smaller one came late."""


class Ping(Message, frozen=True):
    """Heartbeat; answered at once. Any packet counts as a sign of life."""

    now_ns: int


class Pong(Message, frozen=True):
    """Answer to a `Ping`."""

    now_ns: int
    """The ping's `now_ns`, unchanged."""


class Goodbye(Message, frozen=True):
    """The sender stops in an orderly way."""

    reason: str


class Call(Message, frozen=True):
    """A request from one node to another (the command line is forwarded with it)."""

    number: int
    method: str
    parameters: bytes
    """JSON."""


class Reply(Message, frozen=True):
    """Answer to a `Call`."""

    number: int
    error_code: int
    """0, or a wire code of `errors.py`."""
    error_text: str
    result: bytes
    """JSON."""
    hint: str = ""
    """The next command, for an error."""


class GenerationEntry(Message, frozen=True):
    """One history: who made it from which point of its parent."""

    identity: bytes
    token: int
    """Fencing token: grows with every promotion."""
    parent: bytes
    parent_epoch: int
    parent_hash: bytes
    reason: str
    """`created`, `promoted`, `forced` or `rewound`."""
    by: str
    wall_ns: int


class VolumeInfo(Message, frozen=True):
    """A volume as both sides must agree on it."""

    index: int
    name: str
    size_bytes: int
    old_size_bytes: int = 0
    """In an `EpochCommit`: before it; 0 for a volume that it adds."""
    backings: dict[str, str] = msgspec.field(default_factory=dict)
    """Of a volume that was added later: node -> path."""
    is_forced: bool = False
    """Those backings are overwritten if they hold data."""


class StartEntry(Message, frozen=True):
    """A start of the primary, and its last sealed epoch when it began."""

    identity: bytes
    epoch: int
    chain_hash: bytes


class SessionOpen(Message, frozen=True):
    """Primary to secondary: opens or resumes the session of a resource on this link."""

    session: int
    resource: bytes
    """Resource id, 16 bytes."""
    name: str
    chain: list[GenerationEntry]
    """Generation chain, oldest first."""
    volumes: list[VolumeInfo]
    """As of the epoch below."""
    epoch: int
    """Last sealed epoch."""
    chain_hash: bytes
    incarnation: bytes = b""
    """New at each start of the primary: frames spooled from an older one are forgotten, because
    another start may cut the same epoch into other frames."""
    starts: list[StartEntry] = msgspec.field(default_factory=list)
    """The last starts of the primaries that wrote this history, oldest first; durable there. Empty
    from a node of the previous version."""


class SessionAccept(Message, frozen=True):
    """Secondary to primary: where to go on."""

    session: int
    generation: bytes
    """Generation of the position below; 16 zero bytes while blank."""
    durable_epoch: int
    durable_hash: bytes
    applied_epoch: int
    data_state: str
    """`blank`, `inconsistent` or `consistent`."""
    spooled: list[tuple[int, bytes]]
    """Epochs of which frames are here already, each with a bitmap: bit 0 of byte 0 is frame 0."""
    credit_bytes: int
    """Frame body bytes that may be sent in this session before the next grant, in total."""
    consistent_from: int = -1
    """While inconsistent: consistent once this epoch is applied; -1: a resync has to end first."""
    standing_version: int = -1
    """Version of the standing that is durable here, 0 for none; -1: does not know `Announce`."""
    takes_marks: bool = False
    """`Marks` may be sent: an older version closes the link at a message it does not know."""
    volumes: list[VolumeInfo] = msgspec.field(default_factory=list)
    """As of `durable_epoch`; empty from a node of the previous version: its volumes never grow."""
    held_epoch: int = -1
    """While inconsistent: the state from before the resync, which a promotion would restore."""
    gives_digests: bool = False
    """`ResyncAsk` may be sent: an older version closes the link at a message it does not know."""
    takes_verify: bool = False
    """`VerifyPin` and `VerifyAsk` may be sent, as `takes_marks`."""


class SessionRefuse(Message, frozen=True):
    """Either side: the session cannot be; nothing was changed."""

    session: int
    error_code: int
    error_text: str
    chain: list[GenerationEntry] = msgspec.field(default_factory=list)
    """The sender's generation chain, when it has a higher token than the one it was offered."""
    starts: list[StartEntry] = msgspec.field(default_factory=list)
    """Of that chain's history, as in `SessionOpen`."""


class EpochCommit(Message, frozen=True):
    """Primary to secondary: the epoch's frames are these and their table has this hash."""

    session: int
    epoch: int
    first_epoch: int
    generation: bytes
    first_lsn: int
    end_lsn: int
    wall_ns: int
    frames: int
    entries: int
    raw_bytes: int
    chain_hash: bytes
    table_hash: bytes = b""
    """Folds only: the chain hash that starts from 32 zero bytes over the fold's own table."""
    is_mark: bool = False
    volumes: list[VolumeInfo] = msgspec.field(default_factory=list)
    """Volumes that grow or are added in it, by index. Only to a peer that knows growth."""


class MarkEntry(Message, frozen=True):
    """One named epoch."""

    name: str
    generation: bytes
    epoch: int
    wall_ns: int
    is_quiesced: bool
    """The application was quiet at that instant."""


class Marks(Message, frozen=True):
    """Primary to secondary: all marks that are durable at the primary, after each change and when
    a session opens; one is told before the commit of its epoch."""

    session: int
    marks: list[MarkEntry]
    """Ascending by epoch. A mark that is not among them was deleted."""


class Acknowledge(Message, frozen=True):
    """Secondary to primary: cumulative, never goes back within a session."""

    session: int
    received_epoch: int
    durable_epoch: int
    durable_hash: bytes
    applied_epoch: int
    missing_epoch: int
    """Epoch that the bitmap below is about, 0 for none."""
    missing_frames: bytes
    """Bitmap of frames to be sent again."""
    received_bytes: int
    """Frame body bytes received in this session so far; opens the window."""
    credit_bytes: int


class ResyncBegin(Message, frozen=True):
    """Primary to secondary: a resync follows; until its end the image alone is Inconsistent. A
    secondary with undo holds the state from before it."""

    session: int
    generation: bytes
    epoch: int
    """Every epoch after this one is streamed; copied blocks hold this epoch's content or newer."""
    chain_hash: bytes
    total_bytes: int
    number: int
    """Serial number of the resync: frames and acknowledgements of an older one are ignored."""
    volumes: list[VolumeInfo] = msgspec.field(default_factory=list)
    """All volumes as of `epoch`; empty from a node of the previous version."""
    key: int = 0
    """Of the digests that are asked for, 64 bits, another one for each resync."""


class ResyncAsk(Message, frozen=True):
    """Primary to secondary, in a resync: what do these parts of the images hold? Only to a peer
    whose `SessionAccept` says that it answers."""

    session: int
    number: int
    """Of the resync."""
    request: int
    """Number of the ask, from 1 in each resync."""
    unit_blocks: int
    """Blocks that one digest is of: 1, 16 (a region), or a multiple of 16 (a node)."""
    runs: list[tuple[int, int, int]]
    """(volume, first block, units), disjoint."""


class ResyncDigests(Message, frozen=True):
    """Secondary to primary: a part of what was asked, in the order of the ask. What the digests are
    of is durable in the images, and does not change before it is copied."""

    session: int
    number: int
    request: int
    first: int
    """Units of the ask that were answered before."""
    digests: bytes
    """16 bytes each."""


class ResyncEnd(Message, frozen=True):
    """Primary to secondary: all blocks are copied; consistent from `epoch` on."""

    session: int
    number: int
    epoch: int
    frames: int


class ResyncAcknowledge(Message, frozen=True):
    """Secondary to primary: frames [0, frames) are durable in the image."""

    session: int
    number: int
    frames: int
    received_bytes: int
    credit_bytes: int
    is_finished: bool = False
    """The end epoch of the resync is durable at the secondary: nothing of it is needed again."""
    held_epoch: int = -1
    """As in `SessionAccept`."""


class Announce(Message, frozen=True):
    """Primary to secondary: where it is and who is in sync; at most once a second without a change
    of the set, every 10 s when nothing happens. Only to a peer that knows it (`SessionAccept`)."""

    session: int
    standing: Standing


class AnnounceAcknowledge(Message, frozen=True):
    """Secondary to primary: a standing of this version or a later one is durable here."""

    session: int
    version: int


AnyMessage = (
    Hello
    | Use
    | Ping
    | Pong
    | Goodbye
    | Call
    | Reply
    | SessionOpen
    | SessionAccept
    | SessionRefuse
    | EpochCommit
    | Marks
    | Acknowledge
    | ResyncBegin
    | ResyncAsk
    | ResyncDigests
    | ResyncEnd
    | ResyncAcknowledge
    | Announce
    | AnnounceAcknowledge
    | VerifyPin
    | VerifyAsk
    | VerifyAnswer
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode_message(message: Message) -> bytes:
    """The MessagePack body of a message."""
    return _encoder.encode(message)


def decode_message(body: bytes | memoryview) -> AnyMessage:
    """Decode and check the types of one message.

    :raises RemoteProtocolError: not MessagePack, an unknown tag, or a field of a wrong type.
    """
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"control message refused: {error}") from error
