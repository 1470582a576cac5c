"""A circuit whose peer says anything: what the application gets does not depend on the cut, and
ends in good order only if both sides have said so."""

from __future__ import annotations

from geomirror.tunnel.circuit import Circuit, EndApplication, Finish, Reset, ToApplication, ToPeer
from geomirror.tunnel.circuit_pieces import DATA, DONE, END, pack
from tests.fuzz.source import Source, chunks, require_equal


def seeds() -> list[bytes]:
    """A good conversation; ends in every order; lengths and kinds that cannot be."""
    data = pack(DATA, b"hello") + pack(DATA, bytes(300))
    wires = [
        data + pack(END) + pack(DONE),
        data + pack(DONE) + pack(END),
        pack(END) + data,
        pack(DONE) + pack(DONE),
        data + b"\x00\x00\x00\x01",
        data + b"\xff\xff\xff\x01",
        b"\x01\x00\x00\x02x",
        b"\x00\x00\x00\x63",
    ]
    return [bytes([ends, 3, 1, 7, 200]) + wire for ends in (0, 1) for wire in wires]


Story = tuple[bytes, bytes, list[str]]


def run(data: bytes) -> None:
    """The peer's bytes, whole and cut in two ways; the application ends at once, or never."""
    source = Source(data)
    is_ended = source.flag()
    sizes = [source.number() + 1 for _ in range(source.below(6))]
    wire = source.rest()
    stories = [_told(is_ended, cut) for cut in ([wire], chunks(wire, [1]), chunks(wire, sizes))]
    for application, peer, ends in stories:
        # What comes behind the last DONE is looked at only if it comes with it.
        require_equal("a circuit by cut", stories[0][0], application)
        if ends[-1:] == ["finish"]:
            assert is_ended, "finished without our end"
            assert peer == pack(END) + pack(DONE)


def _told(is_ended: bool, parts: list[bytes]) -> Story:
    circuit = Circuit()
    application, peer, ends = b"", b"", []
    if is_ended:
        circuit.application_ended()
    for part in [b"", *parts]:
        circuit.peer_sent(memoryview(part))
        while (decision := circuit.next_decision()) is not None:
            assert ends[-1:] not in (["finish"], ["reset"]), "something comes after the last"
            match decision:
                case ToApplication(view):
                    application += bytes(view)
                case ToPeer(sent):
                    peer += sent
                case EndApplication():
                    ends.append("end")
                    circuit.application_flushed()
                case Finish():
                    ends.append("finish")
                case Reset(reason):
                    assert reason
                    ends.append("reset")
    assert circuit.bytes_received == len(application)
    return application, peer, ends
