"""The handshake, option by option: each dialogue whole and byte by byte, with the same outcome."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.errors import LimitExceededError, RefusedError, RemoteProtocolError, StorageError
from geomirror.nbd import constants as c
from geomirror.nbd.negotiation import BUFFER_BYTES, Negotiation, Phase, TlsMode
from geomirror.nbd.protocol import Export, canonical_names
from tests.nbd.ram_export import RamExport

HELLO = b"NBDMAGICIHAVEOPT\x00\x03"
FLAGS = struct.pack(">I", 3)
DISK = RamExport(name="disk", size_bytes=8192, description="the disk")
READ_ONLY = RamExport(name="ro", size_bytes=4096, is_read_only=True, is_multi_conn=False)
EXPORTS: dict[str, Export] = {"disk": DISK, "alias": DISK, "ro": READ_ONLY}
BASIC = (
    c.EXPORT_HAS_FLAGS
    | c.EXPORT_SEND_FLUSH
    | c.EXPORT_SEND_FUA
    | c.EXPORT_SEND_CACHE
    | c.EXPORT_SEND_TRIM
    | c.EXPORT_SEND_WRITE_ZEROES
    | c.EXPORT_SEND_FAST_ZERO
    | c.EXPORT_CAN_MULTI_CONN
)


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", c.OPTION_MAGIC, number, len(data)) + data


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data)) + data


def go(name: str, *infos: int) -> bytes:
    return string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def query(name: str, *queries: str) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def start(attach=lambda export: None) -> Negotiation:
    return Negotiation(
        lambda name: EXPORTS.get(name or "disk"),
        lambda: canonical_names(EXPORTS.items()),
        attach,
    )


def converse(data: bytes, step: int, attach=lambda export: None) -> tuple[Negotiation, bytes]:
    """Feed in pieces of `step` bytes, as a shell does; the unconsumed rest stays."""
    negotiation = start(attach)
    held = b""
    for at in range(0, len(data), step):
        held += data[at : at + step]
        used = negotiation.receive(memoryview(held))
        held = held[used:]
        assert len(held) < BUFFER_BYTES
    return negotiation, held


def replies(negotiation: Negotiation) -> list[tuple[int, int, bytes]]:
    output = bytes(negotiation.output)
    assert output.startswith(HELLO)
    output, found = output[len(HELLO) :], []
    while output:
        magic, number, kind, length = struct.unpack_from(">QIII", output)
        assert magic == c.OPTION_REPLY_MAGIC
        found.append((number, kind, output[20 : 20 + length]))
        output = output[20 + length :]
    return found


EXPORT_INFO = struct.pack(">HQH", c.INFO_EXPORT, 8192, BASIC)
SIZES = struct.pack(">HIII", c.INFO_BLOCK_SIZE, 1, 4096, 32 << 20)

# name: (options, expected (reply type, data or None for "any human text"), phase)
CASES: dict[str, tuple[bytes, list[tuple[int, bytes | None]], Phase]] = {
    "go": (
        option(c.OPT_GO, go("disk")),
        [(c.REP_INFO, EXPORT_INFO), (c.REP_ACK, b"")],
        Phase.TRANSMISSION,
    ),
    "go to the default export": (
        option(c.OPT_GO, go("")),
        [(c.REP_INFO, EXPORT_INFO), (c.REP_ACK, b"")],
        Phase.TRANSMISSION,
    ),
    "go with every info": (
        option(c.OPT_GO, go("alias", 1, 2, 3, 99)),
        [
            (c.REP_INFO, EXPORT_INFO),
            (c.REP_INFO, b"\0\1disk"),
            (c.REP_INFO, b"\0\2the disk"),
            (c.REP_INFO, SIZES),
            (c.REP_ACK, b""),
        ],
        Phase.TRANSMISSION,
    ),
    "info, then abort": (
        option(c.OPT_INFO, go("disk", 3)) + option(c.OPT_ABORT),
        [(c.REP_INFO, EXPORT_INFO), (c.REP_INFO, SIZES), (c.REP_ACK, b""), (c.REP_ACK, b"")],
        Phase.CLOSED,
    ),
    "abort with data": (option(c.OPT_ABORT, b"bye"), [(c.REP_ACK, b"")], Phase.CLOSED),
    "list": (
        option(c.OPT_LIST),
        [
            (c.REP_SERVER, string("disk") + b"the disk"),
            (c.REP_SERVER, string("ro") + b"a disk in RAM"),
            (c.REP_ACK, b""),
        ],
        Phase.OPTIONS,
    ),
    "list with data": (option(c.OPT_LIST, b"x"), [(c.REP_ERR_INVALID, None)], Phase.OPTIONS),
    "unknown option, its data consumed": (
        option(77, b"x" * 5000) + option(c.OPT_GO, go("disk")),
        [(c.REP_ERR_UNSUP, None), (c.REP_INFO, EXPORT_INFO), (c.REP_ACK, b"")],
        Phase.TRANSMISSION,
    ),
    "no TLS here": (option(c.OPT_STARTTLS), [(c.REP_ERR_UNSUP, None)], Phase.OPTIONS),
    "unknown export": (
        option(c.OPT_GO, go("nope")) + option(c.OPT_INFO, go("nope")),
        [(c.REP_ERR_UNKNOWN, None), (c.REP_ERR_UNKNOWN, None)],
        Phase.OPTIONS,
    ),
    "go without a name": (option(c.OPT_GO), [(c.REP_ERR_INVALID, None)], Phase.OPTIONS),
    "go with a cut name": (
        option(c.OPT_GO, struct.pack(">I", 100) + b"disk"),
        [(c.REP_ERR_INVALID, None)],
        Phase.OPTIONS,
    ),
    "go with a wrong count": (
        option(c.OPT_GO, string("disk") + b"\0\2\0\1"),
        [(c.REP_ERR_INVALID, None)],
        Phase.OPTIONS,
    ),
    "go with trailing bytes": (
        option(c.OPT_GO, go("disk") + b"\0"),
        [(c.REP_ERR_INVALID, None)],
        Phase.OPTIONS,
    ),
    "name of 4097 bytes": (
        option(c.OPT_GO, go("x" * 4097)),
        [(c.REP_ERR_INVALID, None)],
        Phase.OPTIONS,
    ),
    "name of 4096 bytes": (
        option(c.OPT_GO, go("x" * 4096)),
        [(c.REP_ERR_UNKNOWN, None)],
        Phase.OPTIONS,
    ),
    "name that is not UTF-8": (
        option(c.OPT_GO, string(b"\xff\xfe") + b"\0\0"),
        [(c.REP_ERR_INVALID, None)],
        Phase.OPTIONS,
    ),
    "structured replies": (
        option(c.OPT_STRUCTURED_REPLY) + option(c.OPT_GO, go("disk")),
        [
            (c.REP_ACK, b""),
            (c.REP_INFO, struct.pack(">HQH", 0, 8192, BASIC | c.EXPORT_SEND_DF)),
            (c.REP_ACK, b""),
        ],
        Phase.TRANSMISSION,
    ),
    "structured replies with data": (
        option(c.OPT_STRUCTURED_REPLY, b"x"),
        [(c.REP_ERR_INVALID, None)],
        Phase.OPTIONS,
    ),
    "set a context before structured replies": (
        option(c.OPT_SET_META_CONTEXT, query("disk", "base:allocation")),
        [(c.REP_ERR_INVALID, None)],
        Phase.OPTIONS,
    ),
    "set a context": (
        option(c.OPT_STRUCTURED_REPLY)
        + option(c.OPT_SET_META_CONTEXT, query("disk", "x-own:thing", "base:allocation")),
        [(c.REP_ACK, b""), (c.REP_META_CONTEXT, b"\0\0\0\1base:allocation"), (c.REP_ACK, b"")],
        Phase.OPTIONS,
    ),
    "set nothing we know": (
        option(c.OPT_STRUCTURED_REPLY)
        + option(c.OPT_SET_META_CONTEXT, query("disk", "qemu:dirty-bitmap:b", "base:")),
        [(c.REP_ACK, b""), (c.REP_ACK, b"")],
        Phase.OPTIONS,
    ),
    "set for an unknown export": (
        option(c.OPT_STRUCTURED_REPLY)
        + option(c.OPT_SET_META_CONTEXT, query("nope", "base:allocation")),
        [(c.REP_ACK, b""), (c.REP_ERR_UNKNOWN, None)],
        Phase.OPTIONS,
    ),
    "set with a wrong count": (
        option(c.OPT_STRUCTURED_REPLY)
        + option(c.OPT_SET_META_CONTEXT, string("disk") + b"\0\0\0\2" + string("base:allocation")),
        [(c.REP_ACK, b""), (c.REP_ERR_INVALID, None)],
        Phase.OPTIONS,
    ),
    "set without a count": (
        option(c.OPT_STRUCTURED_REPLY) + option(c.OPT_SET_META_CONTEXT, string("disk")),
        [(c.REP_ACK, b""), (c.REP_ERR_INVALID, None)],
        Phase.OPTIONS,
    ),
    "list all contexts": (
        option(c.OPT_LIST_META_CONTEXT, query("disk")),
        [(c.REP_META_CONTEXT, b"\0\0\0\0base:allocation"), (c.REP_ACK, b"")],
        Phase.OPTIONS,
    ),
    "list contexts by wildcard": (
        option(c.OPT_LIST_META_CONTEXT, query("disk", "base:")),
        [(c.REP_META_CONTEXT, b"\0\0\0\0base:allocation"), (c.REP_ACK, b"")],
        Phase.OPTIONS,
    ),
    "list a foreign context": (
        option(c.OPT_LIST_META_CONTEXT, query("disk", "qemu:")),
        [(c.REP_ACK, b"")],
        Phase.OPTIONS,
    ),
}

CONFINED = option(c.OPT_CONFINE, b"disk")
CASES |= {
    "confined: the empty name and every alias": (
        CONFINED + b"".join(option(c.OPT_INFO, go(name)) for name in ("", "disk", "alias")),
        [(c.REP_ACK, b""), *[(c.REP_INFO, EXPORT_INFO), (c.REP_ACK, b"")] * 3],
        Phase.OPTIONS,
    ),
    "confined by an alias: nothing else, in no list": (
        option(c.OPT_CONFINE, b"alias") + option(c.OPT_GO, go("ro")) + option(c.OPT_LIST),
        [
            (c.REP_ACK, b""),
            (c.REP_ERR_UNKNOWN, None),
            (c.REP_SERVER, string("disk") + b"the disk"),
            (c.REP_ACK, b""),
        ],
        Phase.OPTIONS,
    ),
    "confined once and for all": (
        CONFINED + option(c.OPT_CONFINE, b"ro") + option(c.OPT_INFO, go("ro")),
        [(c.REP_ACK, b""), (c.REP_ERR_POLICY, None), (c.REP_ERR_UNKNOWN, None)],
        Phase.OPTIONS,
    ),
    "confined to nothing that is there": (
        b"".join(option(c.OPT_CONFINE, name) for name in (b"nope", b"", b"\xff", b"x" * 5000)),
        [(c.REP_ERR_UNKNOWN, None), *[(c.REP_ERR_INVALID, None)] * 3],
        Phase.OPTIONS,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_options_get_their_replies_however_they_are_cut(name: str, step: int) -> None:
    sent, expected, phase = CASES[name]
    negotiation, rest = converse(FLAGS + sent, step)
    found = replies(negotiation)
    assert [kind for _, kind, _ in found] == [kind for kind, _ in expected]
    for (_, _, data), (_, wanted) in zip(found, expected, strict=True):
        # An error carries a sentence for people.
        assert data == wanted if wanted is not None else len(data.decode()) > 5
    assert negotiation.phase is phase
    assert rest == b""


@pytest.mark.parametrize("name", CASES)
def test_a_cut_dialogue_waits_and_never_fails(name: str) -> None:
    sent = FLAGS + CASES[name][0]
    for end in range(len(sent)):
        converse(sent[:end], 1 << 20)


def test_info_and_go_say_the_same() -> None:
    negotiation, _ = converse(
        FLAGS + option(c.OPT_INFO, go("ro", 1, 2, 3)) + option(c.OPT_GO, go("ro", 1, 2, 3)), 1 << 20
    )
    found = [(kind, data) for _, kind, data in replies(negotiation)]
    half = len(found) // 2
    assert found[:half] == found[half:]
    flags = int.from_bytes(found[0][1][-2:], "big")
    assert flags & c.EXPORT_READ_ONLY
    assert not flags & (c.EXPORT_SEND_TRIM | c.EXPORT_SEND_WRITE_ZEROES | c.EXPORT_CAN_MULTI_CONN)


@pytest.mark.parametrize(("flags", "zeroes"), [(1, 124), (0, 124), (3, 0), (2, 0)])
def test_export_name_is_answered_with_124_zeroes_unless_declined(flags: int, zeroes: int) -> None:
    negotiation, _ = converse(struct.pack(">I", flags) + option(c.OPT_EXPORT_NAME, b"disk"), 3)
    assert negotiation.phase is Phase.TRANSMISSION
    assert bytes(negotiation.output) == HELLO + struct.pack(">QH", 8192, BASIC) + bytes(zeroes)


def test_requests_behind_go_are_left_to_the_transmission_phase() -> None:
    negotiation, rest = converse(FLAGS + option(c.OPT_GO, go("disk")) + b"request", 1 << 20)
    assert negotiation.phase is Phase.TRANSMISSION
    assert rest == b"request"


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (struct.pack(">I", 4), RemoteProtocolError),
        (FLAGS + b"GET / HTTP/1.1\r\n\r\n", RemoteProtocolError),
        (FLAGS + struct.pack(">QII", c.OPTION_MAGIC, 99, 0xFFFFFFFF), LimitExceededError),
        (FLAGS + struct.pack(">QII", c.OPTION_MAGIC, 1, 65537), LimitExceededError),
        (FLAGS + option(c.OPT_EXPORT_NAME, b"nope"), RemoteProtocolError),
        (FLAGS + option(c.OPT_EXPORT_NAME, b"\xff"), RemoteProtocolError),
        (FLAGS + CONFINED + option(c.OPT_EXPORT_NAME, b"ro"), RemoteProtocolError),
        (struct.pack(">I", 0) + option(c.OPT_LIST), RemoteProtocolError),
        (FLAGS + option(99) * 257, LimitExceededError),
    ],
)
def test_what_cannot_be_answered_ends_the_connection(sent: bytes, error: type[Exception]) -> None:
    for step in (1, 1 << 20):
        with pytest.raises(error):
            converse(sent, step)


def test_a_length_bomb_is_refused_before_its_data_arrives() -> None:
    negotiation = start()
    bomb = FLAGS + struct.pack(">QII", c.OPTION_MAGIC, c.OPT_GO, 1 << 31)
    with pytest.raises(LimitExceededError, match="announces 2147483648 bytes"):
        negotiation.receive(memoryview(bomb))


def test_an_export_that_refuses_its_opener_says_why_and_the_client_may_go_on() -> None:
    def attach(export: Export) -> None:
        if export is DISK:
            raise RefusedError("disk has a writer already")
        if export.name == "ro":
            raise StorageError("ro is broken")

    sent = FLAGS + b"".join(option(c.OPT_GO, go(name)) for name in ("disk", "ro"))
    negotiation, _ = converse(sent, 5, attach)
    assert [(kind, data) for _, kind, data in replies(negotiation)] == [
        (c.REP_ERR_POLICY, b"disk has a writer already"),
        (c.REP_ERR_SHUTDOWN, b"ro is broken"),
    ]
    assert negotiation.phase is Phase.OPTIONS
    with pytest.raises(RefusedError):
        converse(FLAGS + option(c.OPT_EXPORT_NAME, b"disk"), 5, attach)


def test_info_opens_nothing() -> None:
    opened: list[str] = []
    sent = FLAGS + option(c.OPT_INFO, go("disk")) + option(c.OPT_GO, go("disk"))
    converse(sent, 1 << 20, lambda export: opened.append(export.name))
    assert opened == ["disk"]


SET_DISK = option(c.OPT_SET_META_CONTEXT, query("disk", "base:allocation"))


@pytest.mark.parametrize(
    ("between", "target", "is_kept"),
    [
        (b"", "disk", True),
        (option(c.OPT_INFO, go("ro")), "disk", True),
        (b"", "ro", False),
        (option(c.OPT_SET_META_CONTEXT, query("disk")), "disk", False),
        (option(c.OPT_SET_META_CONTEXT, query("nope", "base:allocation")), "disk", False),
        (option(c.OPT_SET_META_CONTEXT, b"broken"), "disk", False),
    ],
)
def test_contexts_belong_to_one_export_and_are_replaced_by_each_set(
    between: bytes, target: str, is_kept: bool
) -> None:
    sent = FLAGS + option(c.OPT_STRUCTURED_REPLY) + SET_DISK + between
    negotiation, _ = converse(sent + option(c.OPT_GO, go(target)), 1 << 20)
    assert negotiation.phase is Phase.TRANSMISSION
    assert negotiation.contexts == ({"base:allocation": 1} if is_kept else {})


def start_with_tls(mode: TlsMode = TlsMode.REQUIRE) -> Negotiation:
    return Negotiation(
        lambda name: EXPORTS.get(name or "disk"),
        lambda: canonical_names(EXPORTS.items()),
        lambda export: None,
        tls=mode,
    )


TLS = option(c.OPT_STARTTLS)


def test_before_tls_nothing_but_starttls_and_abort_is_answered() -> None:
    negotiation = start_with_tls()
    sent = b"".join(option(number) for number in (3, 6, 7, 8, 9, 10, 11, c.OPT_CONFINE, 99))
    negotiation.receive(memoryview(FLAGS + sent + option(c.OPT_STARTTLS, b"x")))
    kinds = [kind for _, kind, _ in replies(negotiation)]
    assert kinds == [c.REP_ERR_TLS_REQD] * 9 + [c.REP_ERR_INVALID]
    assert negotiation.phase is Phase.OPTIONS
    negotiation.receive(memoryview(option(c.OPT_ABORT)))
    assert negotiation.phase is Phase.CLOSED
    with pytest.raises(RemoteProtocolError, match="before TLS"):
        start_with_tls().receive(memoryview(FLAGS + option(c.OPT_EXPORT_NAME, b"disk")))


def test_what_was_said_in_the_clear_is_forgotten() -> None:
    negotiation = start_with_tls(TlsMode.ALLOW)
    clear = FLAGS + option(c.OPT_STRUCTURED_REPLY) + SET_DISK + option(c.OPT_CONFINE, b"ro") + TLS
    assert negotiation.receive(memoryview(clear)) == len(clear)
    assert negotiation.phase is Phase.UPGRADING
    assert negotiation.is_structured
    negotiation.secured()
    del negotiation.output[len(HELLO) :]
    negotiation.receive(memoryview(TLS + SET_DISK + option(c.OPT_GO, go("disk"))))
    assert [kind for _, kind, _ in replies(negotiation)] == [
        c.REP_ERR_INVALID,
        c.REP_ERR_INVALID,
        c.REP_INFO,
        c.REP_ACK,
    ]
    assert not negotiation.is_structured
    assert negotiation.contexts == {}


@pytest.mark.parametrize("step", [1, 1 << 20])
def test_a_byte_in_the_clear_behind_starttls_is_a_broken_protocol(step: int) -> None:
    negotiation, sent, held = start_with_tls(), FLAGS + TLS + b"I", b""
    with pytest.raises(RemoteProtocolError, match="in the clear"):
        for at in range(0, len(sent), step):
            held += sent[at : at + step]
            held = held[negotiation.receive(memoryview(held)) :]


@given(st.binary(max_size=400), st.integers(1, 50))
def test_random_bytes_end_in_a_protocol_error_or_wait(noise: bytes, step: int) -> None:
    with contextlib.suppress(RemoteProtocolError):
        converse(FLAGS + noise, step)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([2, 3, 5, 6, 7, 8, 9, 10, 11, c.OPT_CONFINE, 99]),
            st.binary(max_size=60),
        ),
        max_size=8,
    ),
    st.integers(1, 200),
)
def test_whole_and_cut_dialogues_give_the_same_output(
    options: list[tuple[int, bytes]], step: int
) -> None:
    sent = FLAGS + b"".join(option(number, data) for number, data in options)
    whole, _ = converse(sent, len(sent))
    cut, _ = converse(sent, step)
    assert whole.output == cut.output
    assert whole.phase is cut.phase
