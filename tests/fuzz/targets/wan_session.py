"""An authenticated peer that lies: messages and frames with other fields, in any order.

The cores are real, with real engines on simulated disks. A peer that lies is told so with a
`RemoteProtocolError`, or is refused; nothing else is raised, no core spins. Whatever a secondary
says, the primary's content and what its next start finds are what was written there; whatever a
primary says, the secondary starts again.
"""

from __future__ import annotations

import copy
from typing import Any

import msgspec

from geomirror.errors import GeomirrorError
from geomirror.wan_protocol import messages
from geomirror.wan_protocol.decisions import SendFrame, SendMessage
from geomirror.wan_protocol.messages import Message, decode_message, encode_message
from tests.fuzz.source import Source
from tests.fuzz.targets.wan_packets import sample_messages
from tests.wan_protocol.core_machinery import GENERATION
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage

INPUT_BYTES_MAX = 160
STEPS_MAX = 24
_NUMBERS = (-(1 << 63), -1, 0, 1, 2, 7, 255, 1 << 17, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63)
_NUMBERS_ALL = (*_NUMBERS, (1 << 64) - 1)
(_WRITE, _SEAL, _TIME, _LIE, _REPEAT, _FRAME, _RESTART, _RECONNECT, _OVERFLOW) = range(9)
_KINDS: list[type[Message]] = [
    messages.SessionOpen,
    messages.SessionAccept,
    messages.SessionRefuse,
    messages.EpochCommit,
    messages.Acknowledge,
    messages.ResyncBegin,
    messages.ResyncEnd,
    messages.ResyncAcknowledge,
    messages.Ping,
    messages.Announce,
    messages.AnnounceAcknowledge,
    messages.ResyncAsk,
    messages.ResyncDigests,
    messages.VerifyPin,
    messages.VerifyAsk,
    messages.VerifyAnswer,
]
_SAMPLES = [
    msgspec.structs.replace(each, generation=GENERATION)
    if isinstance(each, messages.ResyncBegin)
    else each
    for each in sample_messages()
]


def seeds() -> list[bytes]:
    """Writes, then each kind of message, true and with a changed field, to each side."""
    work = bytes([_WRITE, 3, 2, _SEAL, _TIME, 40, _WRITE, 9, 3, _SEAL])
    found = [work, work + bytes([_OVERFLOW, _RECONNECT, 0, _TIME, 200])]
    for kind in range(len(_KINDS)):
        for target in (0, 1):
            lie = bytes([_LIE, target, kind])
            found.append(work + lie + bytes([0]) + lie + bytes([1, 2, 4, 6, 10, _TIME, 90]))
    found += [work + bytes([_FRAME, at, at, _TIME, 9]) for at in range(6)]
    return [*found, work + bytes([_RESTART, 0, _RESTART, 1, _REPEAT, 0, 3, _TIME, 99])]


class _Story:
    """A stage, and everything that was ever sent on it."""

    def __init__(self) -> None:
        self.stage = Stage()
        self.stage.write_epochs(2)
        self.sent: dict[str, list[SendMessage | SendFrame]] = {PRIMARY: [], PEER: []}
        real = self.stage._send

        def send(source: str, what: SendMessage | SendFrame) -> None:
            self.sent[source].append(what)
            real(source, what)

        self.stage._send = send  # type: ignore[method-assign]
        # As both are at the start of every session.
        self.stage.reconnect()

    def base(self, kind: type[Message], source: str) -> Message:
        """The last true message of this kind, or a sample."""
        for what in reversed(self.sent[source]):
            if isinstance(what, SendMessage) and isinstance(what.message, kind):
                return what.message
        return next(each for each in _SAMPLES if type(each) is kind)

    def deliver(self, source: str, what: SendMessage | SendFrame) -> None:
        """As if the peer had sent it."""
        target = PEER if source == PRIMARY else PRIMARY
        if isinstance(what, SendFrame) and target == PRIMARY:
            return
        self.stage.link_up()
        self.stage._arrive(source, target, what)
        self.stage.settle()


def run(data: bytes) -> None:
    """Tell the story; then look at what both sides hold, and start both again."""
    story = _Story()
    try:
        _tell(story, Source(data))
    finally:
        # In cycles, and some 50 MiB a story: the collector would come too late.
        for big in (story.sent, story.stage.at_epoch, story.stage.content, story.stage.nodes):
            big.clear()


def _tell(story: _Story, source: Source) -> None:
    stage = story.stage
    for _ in range(STEPS_MAX):
        if source.is_empty:
            break
        _step(story, source)
    stage.pass_time(50)
    primary = stage.primary
    if primary.fenced is None:
        _check_content(stage)
        primary.flush("last", stage.now_ns)
        stage.settle()
        stage.restart(PRIMARY)
        assert stage.primary.fenced is None
        _check_content(stage)
    stage.restart(PEER)
    stage.pass_time(200)


def _check_content(stage: Stage) -> None:
    for volume, content in stage.content.items():
        found = stage.primary.engine.read(volume, 0, len(content))
        assert found == content, "a peer changed what the primary holds"


def _step(story: _Story, source: Source) -> None:
    stage, kind = story.stage, source.below(9)
    if kind == _WRITE:
        first, count = source.number(), source.below(8) + 1
        try:
            stage.write_blocks(first, count, seed=first)
        except GeomirrorError:
            stage.pass_time(20)
    elif kind == _SEAL:
        if stage.primary.fenced is None:
            stage.seal()
    elif kind == _TIME:
        stage.pass_time(source.number() * 4)
    elif kind == _LIE:
        _lie(story, source)
    elif kind == _REPEAT:
        who = source.pick((PRIMARY, PEER))
        if story.sent[who]:
            story.deliver(who, source.pick(story.sent[who][-64:]))
    elif kind == _FRAME:
        _change_frame(story, source)
    elif kind == _RESTART:
        who = source.pick((PRIMARY, PEER))
        if who == PEER or stage.primary.fenced is None:
            stage.restart(who, is_kill=True)
    elif kind == _RECONNECT:
        stage.reconnect()
    elif source.below(4) == 0:
        stage.link_down()
        for at in range(30):
            try:
                stage.write_blocks(at * 8, 8, seed=at)
            except GeomirrorError:
                stage.pass_time(50)


def _lie(story: _Story, source: Source) -> None:
    """A message of some kind with some fields replaced; only what the wire can carry is sent."""
    who = source.pick((PRIMARY, PEER))
    base = story.base(source.pick(_KINDS), who)
    changes: dict[str, Any] = {}
    names = type(base).__struct_fields__
    for _ in range(source.below(4)):
        name = source.pick(names)
        changes[name] = _other(getattr(base, name), source)
    message = msgspec.structs.replace(base, **changes)
    try:
        wire = decode_message(encode_message(message))
    except (OverflowError, messages.RemoteProtocolError):
        return
    story.deliver(who, SendMessage(PEER, 0, wire))


def _other(value: Any, source: Source) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + source.below(5) - 2 if source.flag() else source.pick(_NUMBERS_ALL)
    if isinstance(value, bytes):
        flipped = bytes(byte ^ 1 for byte in value)
        return source.pick((b"", bytes(16), bytes(32), b"\xff" * 40, flipped, value[:-1]))
    if isinstance(value, str):
        return source.pick(("", "blank", "inconsistent", "consistent", "x" * 5000, "\ud7ff\0"))
    if isinstance(value, list):
        return source.pick(([], value * 2, value[::-1], [*value, *[(1 << 62, b"\xff" * 9)]]))
    if isinstance(value, dict):
        return source.pick(({}, {"": -1}, {"x" * 65: "durable"}, dict.fromkeys(value, "completed")))
    if isinstance(value, msgspec.Struct):
        name = source.pick(type(value).__struct_fields__)
        return msgspec.structs.replace(value, **{name: _other(getattr(value, name), source)})
    return value


def _change_frame(story: _Story, source: Source) -> None:
    frames = [what for what in story.sent[PRIMARY] if isinstance(what, SendFrame)]
    if not frames:
        return
    frame = copy.copy(source.pick(frames[-16:]))
    how = source.below(6)
    if how == 0:
        frame.sequence = source.pick((0, 1, 1 << 16, 1 << 20, (1 << 32) - 1))
    elif how == 1:
        frame.epoch = source.pick((0, 1, frame.epoch + 1, frame.epoch + 5, (1 << 64) - 1))
    elif how == 2:
        at = source.number() % len(frame.body)
        frame.body = frame.body[:at] + bytes([source.number()]) + frame.body[at + 1 :]
    elif how == 3:
        frame.body = frame.body[: source.number()]
    elif how == 4:
        frame.is_resync = not frame.is_resync
    story.deliver(PRIMARY, frame)
