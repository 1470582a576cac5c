"""Keys and records of neighbours: told, kept, checked, never shown; and overdue handshakes."""

from __future__ import annotations

import base64
import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.environment import MS, SECOND, SeededEntropy
from geomirror.errors import AuthError, IntegrityError, RefusedError
from geomirror.limits import PRODUCTION
from geomirror.tunnel.token import Secret
from geomirror.tunnel.wireguard_actual import PeerState
from geomirror.tunnel.wireguard_book import TunnelBook
from geomirror.tunnel.wireguard_keys import (
    key_text,
    new_private_key,
    pre_shared_key,
    public_key_of,
    read_record,
)
from geomirror.tunnel.wireguard_kicks import FIRST_NS, LAST_NS, Kicks

WALL_NS = 1_800_000_000 * SECOND
GOOD = {"public_key": key_text(bytes(range(32))), "port": 7710, "share": key_text(b"s" * 32)}


def test_a_public_key_is_the_one_that_wg_computes():
    # RFC 7748, section 6.1.
    private = Secret(
        bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    )
    expected = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    assert public_key_of(private) == key_text(expected)


def test_a_new_key_has_the_bits_that_wireguard_sets():
    for seed in range(8):
        key = new_private_key(SeededEntropy(seed)).reveal()
        assert len(key) == 32
        assert key[0] & 7 == 0
        assert key[31] & 0xC0 == 0x40


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_a_pre_shared_key_is_of_both_shares_and_of_who_gave_which(one, other):
    key = pre_shared_key("aa", one, "bb", other).reveal()
    assert key == pre_shared_key("bb", other, "aa", one).reveal()
    assert len(key) == 32
    if one != other:
        assert key != pre_shared_key("aa", other, "bb", one).reveal()


def test_a_pre_shared_key_never_changes_with_a_version():
    key = pre_shared_key("aa", bytes(32), "bb", bytes(range(32))).reveal()
    assert key.hex() == PSK_VECTOR


PSK_VECTOR = "3cf16607688196093d8d486e7b3b447891f4bc8ea056c9dc809174c8e0010d3a"


@pytest.mark.parametrize(
    "change",
    [
        {"public_key": "x"},
        {"public_key": key_text(bytes(32))},
        {"public_key": key_text(b"k" * 31)},
        {"public_key": key_text(b"k" * 32)[:-1]},
        {"public_key": " " + key_text(b"k" * 32)},
        {"public_key": base64.b64encode(b"k" * 32).decode()[:-2] + "t="},
        {"public_key": "é" * 44},
        {"public_key": None},
        {"port": 0},
        {"port": 65536},
        {"port": "7710"},
        {"share": ""},
        {"share": key_text(b"s" * 33)},
    ],
)
def test_what_is_no_record_is_refused_without_repeating_it(change):
    with pytest.raises(AuthError) as caught:
        read_record(GOOD | change)
    assert "sss" not in str(caught.value)
    assert key_text(b"s" * 32) not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "x", {}, {"public_key": 1}])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(AuthError):
        read_record(value)


def test_a_later_version_may_say_more():
    assert read_record(GOOD | {"mtu": 1420}).port == 7710
    assert key_text(b"s" * 32) not in repr(read_record(GOOD))


def test_a_book_comes_back_from_its_file_and_shows_nothing():
    book = TunnelBook.create(SeededEntropy("a"))
    book.own_record("aa", 7710, SeededEntropy("b"))
    assert book.learn("aa", read_record(GOOD), WALL_NS)
    assert not book.learn("aa", read_record(GOOD), WALL_NS + 1)
    assert book.learn("aa", read_record(GOOD | {"port": 1}), WALL_NS)
    book.addresses, book.hosts_file = ["10.77.0.1/32"], "/etc/hosts"
    again = TunnelBook.from_json(book.to_json(), "file")
    assert again.to_json() == book.to_json()
    assert again.public_key == book.public_key
    shown = repr(vars(again)) + repr(again.neighbours)
    for secret in (book.private_key.reveal(), book.neighbours["aa"].share, b"s" * 32):
        assert key_text(secret) not in shown
        assert repr(secret) not in shown


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format": 1}'])
def test_a_damaged_file_is_said_with_what_to_do(data):
    with pytest.raises(IntegrityError, match="delete it"):
        TunnelBook.from_json(data, "file")
    whole = msgspec.json.decode(TunnelBook.create(SeededEntropy("a")).to_json())
    with pytest.raises(IntegrityError):
        TunnelBook.from_json(msgspec.json.encode(whole | {"format": 2}), "file")


def test_ports_stay_and_are_never_given_twice():
    book, entropy = TunnelBook.create(SeededEntropy("a")), SeededEntropy("b")
    ports = {n: book.own_record(f"{n:04x}", 7710, entropy).port for n in range(5)}
    assert sorted(ports.values()) == list(range(7710, 7715))
    again = TunnelBook.from_json(book.to_json(), "file")
    assert {n: again.own_record(f"{n:04x}", 7710, entropy).port for n in range(5)} == ports
    again.forget_all_but({"0000", "0004"})
    assert again.own_record("ffff", 7710, entropy).port == 7711
    # Another first port: everybody moves, and stays there.
    moved = again.own_record("0000", 9000, entropy).port
    assert moved == again.own_record("0000", 9000, entropy).port == 9000


def test_when_all_ports_are_given_away_it_is_said():
    book, entropy = TunnelBook.create(SeededEntropy("a")), SeededEntropy("b")
    for number in range(PRODUCTION.tunnel_ports_max):
        book.own_record(f"{number:04x}", 7710, entropy)
    with pytest.raises(RefusedError, match="no UDP port from 7710"):
        book.own_record("ffff", 7710, entropy)
    with pytest.raises(RefusedError, match="no UDP port from 65535"):
        near = TunnelBook.create(SeededEntropy("a"))
        near.own_record("aa", 65535, entropy)
        near.own_record("bb", 65535, entropy)


def test_a_neighbour_with_our_own_key_is_refused():
    book = TunnelBook.create(SeededEntropy("a"))
    book.own_record("aa", 7710, SeededEntropy("b"))
    with pytest.raises(AuthError, match="claims this node's"):
        book.learn("aa", read_record(GOOD | {"public_key": book.public_key}), WALL_NS)


# ---- Overdue handshakes.

WALL_S = WALL_NS // SECOND


def peer(handshake_s: int, received: int = 0) -> PeerState:
    return PeerState("k", Secret(b""), None, frozenset(), handshake_s, received, 0, 5)


def test_a_handshake_that_does_not_come_is_begun_anew_ever_more_rarely():
    kicks = Kicks()
    assert kicks.delay_s(0) is None
    kicks.saw("w", peer(0), 0, WALL_S)
    assert kicks.delay_s(0) == FIRST_NS / SECOND
    now_ns, times = 0, []
    while now_ns < 120 * SECOND:
        kicks.saw("w", peer(0), now_ns, WALL_S)
        if kicks.take("w", now_ns, 1.0):
            times.append(now_ns)
        now_ns += 100 * MS
    assert times[0] == FIRST_NS
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LAST_NS
    kicks.saw("w", peer(WALL_S - 1), now_ns, WALL_S)
    assert kicks.delay_s(now_ns) is None
    assert not kicks.take("w", now_ns + 100 * SECOND, 1.0)


def test_a_session_that_ran_out_is_overdue_again_and_a_missing_peer_is_not():
    kicks = Kicks()
    kicks.saw("w", peer(WALL_S - 181), 0, WALL_S)
    assert kicks.delay_s(SECOND) == 0.0
    kicks.saw("w", None, 0, WALL_S)
    assert kicks.delay_s(SECOND) is None
    assert not kicks.take("other", 0, 1.0)


def test_a_neighbour_is_heard_when_its_counter_moves():
    kicks = Kicks()
    kicks.saw("w", peer(WALL_S, 0), 1, WALL_S)
    assert kicks.heard_ns("w") is None
    kicks.saw("w", peer(WALL_S, 92), 2, WALL_S)
    kicks.saw("w", peer(WALL_S, 92), 3, WALL_S)
    assert kicks.heard_ns("w") == 2
    kicks.saw("w", peer(WALL_S, 32), 4, WALL_S)  # another process counts from zero
    assert kicks.heard_ns("w") == 4
