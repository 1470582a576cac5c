"""Joining with a token, told as attacks and accidents: who gets in, who does not, what leaks."""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from network_kit import (
    HOUR,
    ShiftedClock,
    Site,
    all_paths,
    authority,
    everything_stored,
    found,
    free_endpoint,
    join_as,
    pair,
    token_of,
)

from geomirror.environment import SECOND, SeededEntropy
from geomirror.errors import (
    AuthError,
    NotFoundError,
    RefusedError,
    TokenError,
    UnreachableError,
    UsageError,
)
from geomirror.limits import PRODUCTION
from geomirror.tunnel.authority_io import enroll, list_tokens, revoke_node, revoke_token
from geomirror.tunnel.certificates import load_certificate, read_claims
from geomirror.tunnel.enrollment import Join
from geomirror.tunnel.identity import NodeIdentity
from geomirror.tunnel.network_io import load_network
from geomirror.tunnel.token import PREFIX, Secret, parse_token


async def test_a_joined_node_knows_the_network_and_survives_a_restart(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        assert east.joined == ["west-1"]
        for site in (east, west, Site(load_network(tmp_path / "west"), west.clock)):
            assert [m.name for m in site.state.membership.active()] == ["east-1", "west-1"]
        again = load_network(tmp_path / "west")
        assert (again.node, again.site, again.listen) == ("west-1", "west", west.state.listen)
        assert again.identity.node_id == west.state.identity.node_id
        assert again.authority is None
        member = east.state.membership.find("west-1")
        assert member is not None
        assert member.endpoints == (west.endpoint,)
        assert member.roles == ("member",)
        assert member.address.startswith("10.203.")
        assert member.address == west.state.claims.address
        assert again.authority_names() == ["east-1"]


async def test_the_certificate_says_what_the_token_says(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        token = token_of(east, "wit-1", site="colo", role="witness")
        site = await join_as(tmp_path / "w", token, east.clock, node="root", listen=None)
        claims = site.state.claims
        assert (claims.name, claims.site, claims.roles) == ("wit-1", "colo", ("witness",))
        assert claims.not_after_ns - claims.not_before_ns == 24 * HOUR + 300 * SECOND


async def test_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with pair(tmp_path):
            paths = all_paths(tmp_path)
            assert len(paths) > 15
            for path in paths:
                wanted = 0o700 if path.is_dir() else 0o600
                assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    finally:
        os.umask(before)


async def test_a_used_token_is_refused_and_the_message_names_the_node(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        token = token_of(east)
        await join_as(tmp_path / "w", token, east.clock)
        with pytest.raises(TokenError, match='already used, by the node "west-1"'):
            await join_as(tmp_path / "x", token, east.clock)
        assert not (tmp_path / "x" / "network" / "network.json").exists()


async def test_two_joiners_race_for_one_token_and_exactly_one_wins(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        token = token_of(east, None)
        names = [f"west-{i}" for i in range(5)]
        results = await asyncio.gather(
            *(join_as(tmp_path / name, token, east.clock, node=name) for name in names),
            return_exceptions=True,
        )
        winners = [result for result in results if isinstance(result, Site)]
        losers = [result for result in results if isinstance(result, TokenError)]
        assert (len(winners), len(losers)) == (1, 4)
        active = [member.name for member in load_network(tmp_path / "east").membership.active()]
        assert active == ["east-1", winners[0].state.node]


async def test_an_expired_token_is_refused_by_the_clock_of_the_authority(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        token = token_of(east, expires_seconds=600)
        east.clock.shift_ns = 601 * SECOND
        with pytest.raises(TokenError, match="expired"):
            await join_as(tmp_path / "w", token, east.clock)
        assert len(east.state.membership.active()) == 1


@pytest.mark.parametrize(("shift_ns", "word"), [(-400 * SECOND, "behind"), (2 * HOUR, "ahead")])
async def test_a_joiner_with_a_wrong_clock_is_told_so_and_keeps_its_token(
    tmp_path: Path, shift_ns: int, word: str
) -> None:
    async with authority(tmp_path) as east:
        token = token_of(east)
        wrong = ShiftedClock()
        wrong.shift_ns = shift_ns
        with pytest.raises(AuthError, match=rf"clock is \d+ s {word}.*clock skew"):
            await join_as(tmp_path / "w", token, wrong)
        await join_as(tmp_path / "w", token, east.clock)


async def test_a_wrong_secret_is_an_unknown_token(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        parsed = parse_token(token_of(east), PRODUCTION)
        for wrong in (
            replace(parsed, secret=Secret(bytes(32))),
            replace(parsed, token_id="0" * 16),
        ):
            with pytest.raises(TokenError, match="unknown to this network"):
                await join_as(tmp_path / "w", wrong.to_text(), east.clock)
        await join_as(tmp_path / "w", parsed.to_text(), east.clock)


async def test_hammering_is_refused_for_a_minute(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        good = token_of(east)
        bad = replace(parse_token(good, PRODUCTION), token_id="f" * 16).to_text()
        for _ in range(PRODUCTION.join_failures_max):
            with pytest.raises(TokenError):
                await join_as(tmp_path / "w", bad, east.clock)
        with pytest.raises(RefusedError, match="too many failed attempts"):
            await join_as(tmp_path / "w", good, east.clock)
        east.clock.shift_ns = 61 * SECOND
        await join_as(tmp_path / "w", good, east.clock)


async def test_the_same_key_may_ask_again_when_its_welcome_was_lost(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        token = token_of(east)
        parsed = parse_token(token, PRODUCTION)
        identity = NodeIdentity.create(SeededEntropy("lost"))
        request = Join(
            token_id=parsed.token_id,
            secret=parsed.secret.reveal(),
            request=identity.request_pem(),
            node=None,
            endpoints=["0.0.0.0:7702"],
        )
        for _ in range(2):
            welcome = enroll(
                east.state,
                request,
                observed_host="198.51.100.4",
                wall_ns=east.clock.wall_ns(),
                entropy=east.entropy,
            )
            claims = read_claims(load_certificate(welcome.certificate.encode()))
            assert (claims.name, claims.node_id) == ("west-1", identity.node_id)
        members = load_network(tmp_path / "east").membership.active()
        assert [member.endpoints for member in members if member.name == "west-1"] == [
            ("198.51.100.4:7702",)
        ]


async def test_a_revoked_key_cannot_ask_again_with_its_old_token(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        token = token_of(east)
        await join_as(tmp_path / "w", token, east.clock)
        revoke_node(east.state, "west-1", wall_ns=east.clock.wall_ns())
        (tmp_path / "w" / "network" / "network.json").unlink()  # the key stays
        with pytest.raises(RefusedError, match="already belongs"):
            await join_as(tmp_path / "w", token, east.clock)
        # Another key may have the name.
        site = await join_as(tmp_path / "x", token_of(east), east.clock)
        assert site.state.node == "west-1"
        assert east.state.membership.revoked_names() == []


async def test_a_name_is_given_once_also_in_another_case(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        with pytest.raises(RefusedError, match='already has a node named "east-1"'):
            token_of(east, "EAST-1")
        open_token = token_of(east, None)
        with pytest.raises(RefusedError, match='already has a node named "east-1"'):
            await join_as(tmp_path / "w", open_token, east.clock, node="East-1")
        await join_as(tmp_path / "w", open_token, east.clock, node="west-1")


async def test_a_data_directory_belongs_to_one_network(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        token = token_of(east)
        with pytest.raises(RefusedError, match="already belongs to a network"):
            await join_as(tmp_path / "east", token, east.clock)
        with pytest.raises(RefusedError, match="already belongs to a network"):
            found(tmp_path / "east", east.clock)


async def test_only_a_node_with_the_authority_key_makes_tokens(tmp_path: Path) -> None:
    async with pair(tmp_path) as (_, west):
        with pytest.raises(RefusedError, match=r'west-1" does not hold.*"east-1"'):
            token_of(west, "colo-1")


async def test_a_token_gives_no_role_that_tokens_do_not_give(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        with pytest.raises(UsageError, match="role"):
            token_of(east, role="authority")
        for seconds in (0, -1, 10**9):
            with pytest.raises(UsageError, match="expires"):
                token_of(east, expires_seconds=seconds)


async def test_tokens_are_listed_and_can_be_taken_back(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        token = token_of(east)
        token_id = parse_token(token, PRODUCTION).token_id
        assert [record.token_id for record in list_tokens(east.state)] == [token_id]
        revoke_token(east.state, token_id)
        with pytest.raises(TokenError, match="unknown"):
            await join_as(tmp_path / "w", token, east.clock)
        with pytest.raises(NotFoundError):
            revoke_token(east.state, token_id)


async def test_the_secret_is_stored_nowhere_and_shown_nowhere(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        token = token_of(east)
        parsed = parse_token(token, PRODUCTION)
        secret = parsed.secret.reveal()
        west = await join_as(tmp_path / "w", token, east.clock)
        stored = everything_stored(tmp_path)
        assert secret not in stored
        assert secret.hex().encode() not in stored
        assert token.encode() not in stored
        with pytest.raises(TokenError) as caught:
            await join_as(tmp_path / "x", token, east.clock)
        join = Join(token_id="", secret=secret, request="", node=None, endpoints=[])
        for thing in (parsed, parsed.secret, join, west.state, east.state, caught.value):
            text = f"{thing!r} {thing}"
            assert token[20:60] not in text
            assert secret.hex() not in text
            assert str(secret)[2:-1] not in text
            assert "PRIVATE KEY" not in text


async def test_the_next_endpoint_is_tried_and_none_is_unreachable(tmp_path: Path) -> None:
    async with authority(tmp_path) as east:
        token = token_of(east, endpoints=[free_endpoint(), east.endpoint])
        await join_as(tmp_path / "w", token, east.clock)
        lost = token_of(east, "colo-1", endpoints=[free_endpoint()])
        with pytest.raises(UnreachableError, match="no endpoint of the join token answers"):
            await join_as(tmp_path / "c", lost, east.clock)


def test_a_printed_token_is_one_short_line(tmp_path: Path) -> None:
    east = found(tmp_path / "east", ShiftedClock())
    token = token_of(east)
    assert token.startswith(PREFIX)
    assert len(token) < 250
    assert token.isascii() and token.isprintable() and " " not in token
