"""Tokens as text and as records: exact round trips, and no damage goes unnoticed."""

from __future__ import annotations

import base64
import string
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from geomirror.environment import SECOND, SeededEntropy
from geomirror.errors import IntegrityError, RefusedError, TokenError
from geomirror.limits import PRODUCTION, Limits
from geomirror.tunnel.token import PREFIX, Secret, Token, TokenBook, parse_token

ENTROPY = SeededEntropy("tokens")
SAMPLE = Token(
    network="acme",
    authority_hash=bytes(range(32)),
    endpoints=("203.0.113.7:7701", "[2001:db8::7]:7701", "hub.example.org:443"),
    token_id="0011223344556677",
    secret=Secret(bytes(range(100, 132))),
    expires_ns=1_900_000_000 * SECOND,
)


def fields(token: Token) -> tuple[object, ...]:
    return (
        token.network,
        token.authority_hash,
        token.endpoints,
        token.token_id,
        token.secret.reveal(),
        token.expires_ns,
    )


def test_a_token_survives_text_and_the_white_space_around_it() -> None:
    assert fields(parse_token(f"\n {SAMPLE.to_text()} \r\n", PRODUCTION)) == fields(SAMPLE)


@given(
    network=st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,30}[A-Za-z0-9])?", fullmatch=True),
    authority_hash=st.binary(min_size=32, max_size=32),
    port=st.integers(1, 65535),
    token_id=st.binary(min_size=8, max_size=8),
    secret=st.binary(min_size=32, max_size=32),
    expires=st.integers(1, (1 << 33) - 1),
)
def test_every_token_survives_text(
    network, authority_hash, port, token_id, secret, expires
) -> None:
    endpoints = (f"192.0.2.1:{port}",)
    made = Token(
        network, authority_hash, endpoints, token_id.hex(), Secret(secret), expires * SECOND
    )
    assert fields(parse_token(made.to_text(), PRODUCTION)) == fields(made)


def test_every_truncation_is_refused() -> None:
    text = SAMPLE.to_text()
    for length in range(len(text)):
        with pytest.raises(TokenError):
            parse_token(text[:length], PRODUCTION)


def test_every_changed_character_is_refused() -> None:
    text = SAMPLE.to_text()
    for place in range(len(text)):
        for wrong in ("A", "_", " ", "é", "="):
            if text[place] == wrong:
                continue
            damaged = text[:place] + wrong + text[place + 1 :]
            with pytest.raises(TokenError):
                parse_token(damaged, PRODUCTION)


@pytest.mark.parametrize("network", ["n", "ne", "net"])
def test_unused_bits_of_the_last_character_are_as_printed(network: str) -> None:
    text = replace(SAMPLE, network=network).to_text()
    accepted = 0
    for last in string.ascii_letters + string.digits + "-_":
        with suppress(TokenError):
            accepted += parse_token(text[:-1] + last, PRODUCTION) is not None
    assert accepted == 1


@given(st.text(max_size=300))
def test_any_text_is_refused_with_a_token_error_that_does_not_repeat_it(text: str) -> None:
    for candidate in (text, PREFIX + text):
        with pytest.raises(TokenError) as caught:
            parse_token(candidate, PRODUCTION)
        if len(candidate) > 8:
            assert candidate not in str(caught.value)


def with_valid_check(body: bytes) -> str:
    import hashlib

    check = hashlib.sha256(b"geomirror token v1\0" + body).digest()[:4]
    return PREFIX + base64.urlsafe_b64encode(check + body).rstrip(b"=").decode()


@given(st.binary(max_size=400))
@example(b"\x96\xa1\x80")
def test_any_bytes_with_a_valid_check_are_refused(body: bytes) -> None:
    with pytest.raises(TokenError):
        parse_token(with_valid_check(body), PRODUCTION)


@pytest.mark.parametrize(
    "change",
    [
        {"network": "ac\nme"},
        {"network": ""},
        {"endpoints": ()},
        {"endpoints": ("203.0.113.7",)},
        {"endpoints": ("203.0.113.7:0",)},
        {"endpoints": ("a b:1",)},
        {"endpoints": tuple(f"192.0.2.{i}:1" for i in range(9))},
        {"token_id": "00"},
        {"secret": Secret(b"short")},
        {"authority_hash": b""},
        {"expires_ns": 0},
        {"expires_ns": -SECOND},
    ],
)
def test_a_token_with_a_senseless_field_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(TokenError):
        parse_token(replace(SAMPLE, **change).to_text(), PRODUCTION)


def test_an_endless_token_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(TokenError, match="not a join token"):
        parse_token(PREFIX + "A" * 10_000_000, PRODUCTION)


# -- the book ---------------------------------------------------------------------------------


def create(book: TokenBook, wall_ns: int = 0, *, limits: Limits = PRODUCTION, **options) -> Token:
    return book.create(
        **{
            "network": "acme",
            "authority_hash": bytes(32),
            "endpoints": ("192.0.2.1:1",),
            "site": "west",
            "node": None,
            "role": "member",
            "expires_seconds": 60,
            "wall_ns": wall_ns,
            "entropy": ENTROPY,
            "limits": limits,
            **options,
        }
    )


def test_a_token_lives_from_creation_to_expiry_and_dies_with_its_use() -> None:
    book = TokenBook()
    token = create(book, 5 * SECOND)
    record = book.check(token.token_id, token.secret, "key-1", 64 * SECOND)
    with pytest.raises(TokenError, match="expired 0 s ago"):
        book.check(token.token_id, token.secret, "key-1", 65 * SECOND)
    book.consume(record, "west-1", "key-1", 64 * SECOND)
    assert book.check(token.token_id, token.secret, "key-1", 64 * SECOND).used_by == "west-1"
    with pytest.raises(TokenError, match='by the node "west-1"'):
        book.check(token.token_id, token.secret, "key-2", 64 * SECOND)


def test_a_used_token_says_used_also_after_expiry_and_after_a_restart() -> None:
    book = TokenBook()
    token = create(book)
    book.consume(book.records[token.token_id], "west-1", "key-1", SECOND)
    again = TokenBook.from_json(book.to_json())
    with pytest.raises(TokenError, match="already used"):
        again.check(token.token_id, token.secret, "key-2", 10**6 * SECOND)


def test_the_file_does_not_hold_the_secret() -> None:
    book = TokenBook()
    token = create(book)
    stored = book.to_json()
    assert token.secret.reveal() not in stored
    assert token.secret.reveal().hex().encode() not in stored
    assert base64.b64encode(token.secret.reveal()) not in stored
    assert token.token_id.encode() in stored


def test_the_book_is_bounded_and_forgets_dead_tokens_first() -> None:
    small = replace(PRODUCTION, token_records_max=3)
    book = TokenBook()
    tokens = [create(book, n * SECOND, limits=small) for n in range(3)]
    with pytest.raises(RefusedError, match="too many unused"):
        create(book, 4 * SECOND, limits=small)
    book.consume(book.records[tokens[1].token_id], "west-1", "key", 4 * SECOND)
    create(book, 5 * SECOND, limits=small)
    assert tokens[1].token_id not in book.records
    create(book, 60 * SECOND, limits=small)  # the first has expired
    assert len(book.records) == 3


@given(st.binary(max_size=200))
def test_a_damaged_book_is_a_typed_error(data: bytes) -> None:
    if data.strip() != b"[]":
        with pytest.raises(IntegrityError, match="damaged"):
            TokenBook.from_json(data)
