"""Membership: signed entries, newest wins in any order; and the core's other small decisions."""

from __future__ import annotations

import itertools
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.environment import SECOND, SeededEntropy
from geomirror.errors import (
    AuthError,
    ConfigError,
    GeomirrorError,
    IntegrityError,
    RefusedError,
    RemoteProtocolError,
)
from geomirror.limits import PRODUCTION
from geomirror.tunnel.attempts import SOURCES_MAX, AttemptLimiter
from geomirror.tunnel.authority import Authority, check_range, choose_address
from geomirror.tunnel.enrollment import (
    encode_line,
    read_hello,
    read_reply,
    read_request_line,
    refusal,
)
from geomirror.tunnel.identity import (
    _WEAK_PUBLIC_KEYS,
    Ed25519PublicKey,
    NodeIdentity,
    is_weak,
    key_from_pem,
    public_bytes,
)
from geomirror.tunnel.membership import (
    Member,
    Membership,
    Revocations,
    Revoked,
    Signed,
    decode_updates,
    sign_member,
    sign_revocations,
)
from geomirror.tunnel.names import check_name, join_endpoint, propose_name, split_endpoint

AUTHORITY = Authority.create("acme", 10**18, SeededEntropy("acme"))


def member(name: str, version: int, *, key: str = "", **options) -> Member:
    return Member(
        **{
            "network": "acme",
            "node_id": key or f"id-{name}",
            "name": name,
            "site": "west",
            "roles": ("member",),
            "endpoints": (),
            "address": "10.203.0.1",
            "serial": "1",
            "version": version,
            **options,
        }
    )


def empty() -> Membership:
    return Membership("acme", AUTHORITY.public_key, PRODUCTION)


ENTRIES = [
    sign_member(AUTHORITY, member("east-1", 1)),
    sign_member(AUTHORITY, member("west-1", 2)),
    sign_member(AUTHORITY, member("west-2", 3, key="id-west-1")),
    sign_member(AUTHORITY, member("colo-1", 4)),
    sign_member(AUTHORITY, member("colo-1", 5, revoked=True)),
    sign_revocations(AUTHORITY, Revocations("acme", 1, (Revoked("id-colo-1", "colo-1", 0),))),
]


def test_entries_in_any_order_and_any_pieces_give_the_same_state() -> None:
    wanted = empty()
    assert wanted.merge(ENTRIES)
    assert [m.name for m in wanted.active()] == ["east-1", "west-2"]
    assert wanted.revoked_names() == ["colo-1"]
    for order in itertools.permutations(ENTRIES):
        found = empty()
        for entry in order:
            found.merge([entry])
        assert found.to_json() == wanted.to_json()
        assert found.digest() == wanted.digest() == (5, 1)


def test_merging_what_is_known_changes_nothing() -> None:
    membership = empty()
    membership.merge(ENTRIES)
    assert membership.merge(ENTRIES) is False
    assert membership.merge(membership.updates()) is False
    assert membership.merge([]) is False


def test_a_revocation_list_is_never_rolled_back() -> None:
    membership = empty()
    newer = Revocations("acme", 2, (Revoked("a", "a-1", 0), Revoked("b", "b-1", 0)))
    membership.merge([sign_revocations(AUTHORITY, newer)])
    membership.merge([sign_revocations(AUTHORITY, Revocations("acme", 1, ()))])
    assert membership.is_revoked("a")
    assert membership.is_revoked("b")
    assert membership.revoked_names() == ["a-1", "b-1"]


def test_the_list_alone_revokes_a_member_whose_entry_is_old() -> None:
    membership = empty()
    membership.merge([sign_member(AUTHORITY, member("colo-1", 4)), ENTRIES[-1]])
    assert membership.find("colo-1") is None
    assert membership.revoked_names() == ["colo-1"]


def test_a_name_given_anew_is_not_a_revoked_name() -> None:
    membership = empty()
    membership.merge(ENTRIES)
    membership.merge([sign_member(AUTHORITY, member("colo-1", 6, key="id-new"))])
    assert membership.revoked_names() == []
    assert membership.is_revoked("id-colo-1")
    assert not membership.is_revoked("id-new")


def test_a_bad_entry_among_good_ones_changes_nothing() -> None:
    good = sign_member(AUTHORITY, member("east-1", 1))
    other = Authority.create("acme", 10**18, SeededEntropy("other"))
    moved = AUTHORITY.sign(b"geomirror revocations v1\0" + good.payload.encode())
    bad = [
        sign_member(other, member("evil-1", 9)),
        msgspec.structs.replace(good, payload=good.payload.replace("east-1", "evil-1")),
        msgspec.structs.replace(good, signature=""),
        msgspec.structs.replace(good, signature="é"),
        msgspec.structs.replace(good, payload="\ud800"),
        msgspec.structs.replace(good, kind="revocations"),
        msgspec.structs.replace(good, signature=moved.hex()),
        sign_member(
            Authority(AUTHORITY._key, AUTHORITY.certificate, "acme"),
            member("east-1", 9, network="else"),
        ),
    ]
    for entry in bad:
        membership = empty()
        with pytest.raises(AuthError):
            membership.merge([good, entry])
        assert membership.members() == []


@given(st.integers(0, 2), st.data())
def test_any_flipped_bit_of_a_stored_entry_is_noticed(which: int, data) -> None:
    stored = json.loads(empty_with_entries().to_json())
    text = stored[which][data.draw(st.sampled_from(["payload", "signature"]))]
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
    damaged = json.dumps(stored).replace(json.dumps(text), json.dumps(changed))
    if place >= len(text) - 3 and text.endswith("="):
        return  # unused bits of base64
    with pytest.raises(IntegrityError):
        Membership.from_json(damaged.encode(), "acme", AUTHORITY.public_key, PRODUCTION)


def empty_with_entries() -> Membership:
    membership = empty()
    membership.merge(ENTRIES[:4])
    return membership


@given(st.binary(max_size=200))
def test_any_bytes_as_updates_are_a_typed_error(data: bytes) -> None:
    try:
        entries = decode_updates(data)
    except AuthError:
        return
    assert all(isinstance(entry, Signed) for entry in entries)


# -- the join exchange's lines ------------------------------------------------------------------


@given(
    st.one_of(
        st.binary(max_size=300),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=20),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(
                    st.sampled_from(
                        [
                            "type",
                            "token_id",
                            "secret",
                            "request",
                            "node",
                            "endpoints",
                            "version",
                            "nonce",
                            "code",
                            "message",
                            "members",
                            "certificate",
                        ]
                    ),
                    inner,
                    max_size=6,
                )
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_line_is_understood_or_a_protocol_error(line: bytes) -> None:
    for read in (read_hello, read_request_line, read_reply):
        try:
            read(line)
        except (RemoteProtocolError, RefusedError):
            continue
        except GeomirrorError:
            # A well-formed refusal raises the error that it names.
            is_refusal = read is read_reply and b"refuse" in line
            assert is_refusal


def test_a_refusal_arrives_as_the_error_it_was_without_control_characters() -> None:
    error = RefusedError("no\x1b[31m\nroom", hint="try\r later")
    with pytest.raises(RefusedError) as caught:
        read_reply(encode_line(refusal(error)))
    assert caught.value.message == "no?[31m?room"
    assert caught.value.hint == "try? later"


# -- attempts -----------------------------------------------------------------------------------


def test_a_source_is_refused_after_ten_failures_and_let_in_a_minute_later() -> None:
    limiter = AttemptLimiter(PRODUCTION)
    for second in range(10):
        limiter.check("a", second * SECOND)
        limiter.failed("a", second * SECOND)
    with pytest.raises(RefusedError, match="try again in 51 s"):
        limiter.check("a", 10 * SECOND)
    limiter.check("b", 10 * SECOND)
    limiter.check("a", 60 * SECOND)
    limiter.failed("a", 60 * SECOND)
    with pytest.raises(RefusedError):
        limiter.check("a", 60 * SECOND)


def test_a_flood_of_sources_does_not_grow_the_table() -> None:
    limiter = AttemptLimiter(PRODUCTION)
    for number in range(3 * SOURCES_MAX):
        limiter.failed(str(number), number)
    assert len(limiter._failures) == SOURCES_MAX


# -- names, endpoints, keys, addresses ------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "east-1", "A_b-9", "x" * 32])
def test_good_names(name: str) -> None:
    assert check_name(name, "node") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-a",
        "a-",
        "a b",
        "a/b",
        "a.b",
        "..",
        "a\n",
        "é",
        "аdmin",
        "x" * 33,
        "localhost",
        "ALL",
        None,
        7,
    ],
)
def test_bad_names_are_refused_without_control_characters_in_the_message(name: object) -> None:
    with pytest.raises(ConfigError) as caught:
        check_name(name, "node")
    assert str(caught.value).isprintable()


@given(st.text(max_size=80))
def test_any_host_name_gives_a_good_node_name(text: str) -> None:
    assert check_name(propose_name(text), "node")


@pytest.mark.parametrize("text", ["192.0.2.1:7701", "[::1]:1", "hub.example.org:443", "0.0.0.0:0"])
def test_endpoints_survive(text: str) -> None:
    assert join_endpoint(*split_endpoint(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", ":1", "a:", "a", "a:65536", "a:-1", "a:٣", "::1:7", "[::1]", "a\nb:1", "a" * 130 + ":1"],
)
def test_bad_endpoints_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        split_endpoint(text)


def edwards_order_divides_eight(encoded: bytes) -> bool:
    """Decode a point as RFC 8032 does and double it three times."""
    p = 2**255 - 19
    d = -121665 * pow(121666, p - 2, p) % p
    y = int.from_bytes(encoded, "little") % (1 << 255) % p
    x_squared = (y * y - 1) * pow(d * y * y + 1, p - 2, p) % p
    x = pow(x_squared, (p + 3) // 8, p)
    if (x * x - x_squared) % p:
        x = x * pow(2, (p - 1) // 4, p) % p
    assert (x * x - x_squared) % p == 0
    for _ in range(3):
        product = d * x * x * y * y % p
        x, y = (
            2 * x * y * pow(1 + product, p - 2, p) % p,
            (y * y + x * x) * pow(1 - product, p - 2, p) % p,
        )
    return (x, y) == (0, 1)


def test_the_weak_keys_are_exactly_points_of_small_order() -> None:
    assert len(_WEAK_PUBLIC_KEYS) == 7
    for encoded in sorted(_WEAK_PUBLIC_KEYS):
        assert edwards_order_divides_eight(encoded)
        assert is_weak(Ed25519PublicKey.from_public_bytes(encoded))
    honest = NodeIdentity.create(SeededEntropy(1)).public_key
    assert not edwards_order_divides_eight(public_bytes(honest))
    assert not is_weak(honest)


def test_addresses_follow_the_key_and_step_over_taken_ones() -> None:
    key = NodeIdentity.create(SeededEntropy(1)).public_key
    first = choose_address(key, "10.203.0.0/16", ())
    assert first == choose_address(key, "10.203.0.0/16", ())
    second = choose_address(key, "10.203.0.0/16", (first,))
    assert second != first
    everything = {f"192.0.2.{number}" for number in range(256)}
    with pytest.raises(RefusedError, match="no virtual address is free"):
        choose_address(key, "192.0.2.0/24", everything)


@pytest.mark.parametrize("cidr", ["", "10.0.0.1/16", "10.0.0.0/30", "::/64", "0.0.0.0/0", "x"])
def test_a_range_that_cannot_be_used_is_refused(cidr: str) -> None:
    with pytest.raises(ConfigError, match="--range"):
        check_range(cidr)


@pytest.mark.parametrize("pem", [b"", b"junk", AUTHORITY.key_pem()[:60]])
def test_a_damaged_key_file_is_named_and_not_quoted(pem: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"identity/node\.key is not an Ed25519"):
        key_from_pem(pem, name="identity/node.key")
