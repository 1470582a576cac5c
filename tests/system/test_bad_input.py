"""What an operator or a stranger may get wrong: refused with its cause, and nothing is harmed."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.cli.main import run
from geomirror.environment import SystemClock, SystemEntropy
from geomirror.errors import GeomirrorError
from geomirror.nbd.client_io import NbdClient
from geomirror.tunnel.network_state_io import load_network
from geomirror.tunnel.tls_io import TlsDriver
from tests.system.support import MIB, Site, count_links, create, make_network, some_sites, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
DATA = random.Random(1).randbytes(MIB)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Site]]:
    """Two linked nodes with the resource pg, which holds DATA."""
    with some_sites(tmp_path_factory.mktemp("pair"), "a", "b") as (a, b):
        make_network(a, b)
        create(a, "pg")
        asyncio.run(a.write(0, DATA))
        yield a, b


@pytest.fixture(autouse=True)
def unharmed(pair: tuple[Site, Site]) -> Iterator[None]:
    """After every test: both daemons are the same processes, linked, and the data is there."""
    a, b = pair
    assert a.process is not None and b.process is not None
    before = a.process.pid, b.process.pid
    yield
    assert (a.process.poll(), b.process.poll()) == (None, None)
    assert (a.process.pid, b.process.pid) == before
    assert count_links(a) == count_links(b) == 1
    assert asyncio.run(a.read(0, MIB)) == DATA
    a.call("resource.wait", name="pg", kind="applied", timeout_s=30)
    assert asyncio.run(b.read(0, MIB)) == DATA
    assert a.crashes() == b.crashes() == []


# ---- Tokens.


def refused_join(root: Path, token: str, *, code: str = "token") -> str:
    """Join must fail, and leave no network behind: `node run` would refuse."""
    joiner = Site(root, "joiner")
    said = joiner.error("join", token, expected=10, code=code)
    assert not (joiner.data_dir / "network/network.json").exists()
    return said


def test_a_token_works_once_and_only_as_it_was_printed(pair, tmp_path: Path):
    a, _ = pair
    token = a.run("token", "create", "--site", "south", "--expires", "10m").strip()
    changed = "x" if token[-1] != "x" else "y"
    for wrong in ("nonsense", token[: len(token) // 2], token[:-1] + changed, "gm" + token):
        refused_join(tmp_path, wrong)
    c = Site(tmp_path, "c")
    c.run("join", "-", "--node", "south-1", stdin=token)
    assert "used" in refused_join(tmp_path, token)
    assert [n["node"] for n in a.call("node.list")["nodes"]] == ["east-1", "south-1", "west-1"]


def test_an_expired_token_says_so(pair, tmp_path: Path):
    a, _ = pair
    token = a.run("token", "create", "--site", "south", "--expires", "1s").strip()
    time.sleep(1.2)
    said = refused_join(tmp_path, token)
    assert "expired" in said
    assert "token create" in said


def test_a_token_of_another_network_is_refused_before_its_secret_is_told(pair, tmp_path: Path):
    a, _ = pair
    evil = Site(tmp_path, "evil")
    # Its token leads to the port of our node, which cannot prove to be of that network.
    listen = f"127.0.0.1:{a.port}"
    evil.run("network", "create", "acme", "--site", "x", "--node", "east-1", "--listen", listen)
    token = evil.run("token", "create", "--site", "x").strip()
    assert listen in refused_join(tmp_path, token, code="auth")


# ---- Strangers at the port.


def talk(site: Site, data: bytes, *, timeout_s: float = 6) -> bytes:
    """Send bytes to the node's port; what it answers until it closes."""
    with socket.create_connection(("127.0.0.1", site.port), timeout_s) as channel:
        channel.sendall(data)
        try:
            return b"".join(iter(lambda: channel.recv(4096), b""))
        except ConnectionError:
            return b""


def refusals(site: Site) -> list[str]:
    return [event["reason"] for event in site.events("connection_refused")]


def test_garbage_and_plain_http_get_no_answer_that_tells_anything(pair):
    a, _ = pair
    before = len(refusals(a))
    names = (b"acme", b"east", b"geomirror")
    for data in (os.urandom(4096), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\xff\xff"):
        answer = talk(a, data)
        assert len(answer) < 64  # at most a TLS alert
        assert not any(name in answer for name in names)
    until(lambda: len(refusals(a)) >= before + 3)
    assert all("handshake failed" in reason for reason in refusals(a)[before:])


def test_tls_without_a_certificate_gets_nothing(pair):
    a, _ = pair
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for protocols in ([], ["geomirror/1"], ["h2"]):
        if protocols:
            context.set_alpn_protocols(protocols)
        plain = socket.create_connection(("127.0.0.1", a.port), 6)
        with plain:
            try:
                with context.wrap_socket(plain, server_hostname="localhost") as channel:
                    shown = channel.getpeercert(binary_form=True) or b""
                    assert not any(name in shown for name in (b"acme", b"east"))
                    channel.sendall(os.urandom(1000))
                    assert channel.recv(100) == b""
            except (ssl.SSLError, ConnectionError):
                pass  # refused already in the handshake


async def test_a_node_of_another_network_is_not_linked_with(pair, tmp_path: Path):
    a, b = pair
    evil = Site(tmp_path, "evil")
    evil.run("network", "create", "acme", "--site", "west", "--node", "west-1")
    state = load_network(evil.data_dir)
    # It names our network's server, as one who had seen it on the wire could.
    state.authority_certificate = load_network(b.data_dir).authority_certificate
    driver = TlsDriver(state, SystemClock(), SystemEntropy())
    before = len(refusals(a))
    with pytest.raises(GeomirrorError):
        await driver.dial("east-1", f"127.0.0.1:{a.port}", asyncio.Protocol)
    until(lambda: len(refusals(a)) > before)
    assert "handshake failed" in refusals(a)[-1]


# ---- The command line and the configuration.


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "named"),
    [
        (("nonsense",), 2, "usage", "nonsense"),
        (("resource", "create", "x"), 2, "usage", "--primary"),
        (("resource", "create", "x", "--primary", "east-1"), 2, "usage", "--size"),
        (("resource", "create", "x", "--primary", "e", "--size", "1M"), 4, "not_found", '"e"'),
        (("resource", "create", "../x", "--primary", "east-1", "--size", "1M"), 2, "usage", "x"),
        (("resource", "create", "x", "--primary", "east-1", "--size", "-1"), 2, "usage", "size"),
        (("resource", "create", "x", "--primary", "east-1", "--size", "1000"), 2, "usage", "512"),
        (("resource", "create", "x", "--primary", "east-1", "--size", "1P"), 2, "usage", "x/0"),
        (
            ("resource", "create", "x", "--primary", "east-1", "--size", "1M", "--journal-size=1M"),
            *(2, "usage", "--journal-size"),
        ),
        (("resource", "delete", "none", "--yes"), 4, "not_found", '"none"'),
        (("resource", "delete", "pg"), 2, "usage", "--yes"),
        (("wait", "pg", "--timeout", "soon"), 2, "usage", "soon"),
        (("pause", "pg", "--peer", "nobody"), 4, "not_found", '"nobody"'),
        (("status", "none"), 4, "not_found", '"none"'),
        (("token", "create"), 2, "usage", "--site"),
        (("token", "create", "--site", "a b"), 2, "usage", "site name"),
        (("join", "-", "--token-file", "x"), 2, "usage", "TOKEN"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_on_the_command_line(pair, arguments, exit_code, code, named, capsys):
    assert named in pair[0].error(*arguments, expected=exit_code, code=code)
    assert run(["--data-dir", str(pair[0].data_dir), *arguments]) == exit_code
    said = capsys.readouterr().err
    assert f"(exit {exit_code})" in said or "Usage" in said
    names = [r["name"] for r in pair[0].call("resource.list")["resources"]]
    assert names == ["pg"]


def test_without_a_network_every_command_says_how_to_begin(tmp_path: Path):
    empty = Site(tmp_path, "empty")
    for arguments, exit_code, code in (
        (("status",), 3, "unreachable"),
        (("node", "run"), 4, "not_found"),
        (("node", "show"), 4, "not_found"),
        (("network", "show"), 4, "not_found"),
        (("token", "create", "--site", "x"), 4, "not_found"),
        (("resource", "list"), 3, "unreachable"),
    ):
        said = empty.error(*arguments, expected=exit_code, code=code)
        assert str(empty.data_dir) in said
        assert "network create" in said
        assert not empty.data_dir.exists()


def test_a_bad_configuration_keeps_a_daemon_from_starting(tmp_path: Path):
    site = Site(tmp_path, "n")
    site.run("network", "create", "acme", "--site", "x", "--node", "n")
    config = site.data_dir / "geomirror.toml"
    for text, named in (
        (b"[node]\nlisten = 7\n", "node.listen"),
        (b"[nodes]\n", "did you mean"),
        (b"[storage]\ndirty_bytes_max = 1\n", "storage.dirty_bytes_max"),
        (b"[log\n", "not TOML"),
        (b"a = " + b"[" * 50_000, "not TOML"),
        (b"[log]\nlevel = 'debug'\n\xff", "not UTF-8"),
    ):
        config.write_bytes(text)
        config.chmod(0o600)
        said = site.error("node", "check-config", expected=2, code="config")
        assert str(config) in said
        assert named in said
    assert "not UTF-8" in site.failed_start(expected=2)
    config.write_text("")
    config.chmod(0o666)
    assert "chmod go-w" in site.failed_start(expected=2)


# ---- Who holds what.


def test_a_second_daemon_on_the_same_data_directory_is_refused(pair):
    a, _ = pair
    assert a.process is not None
    said = a.error("node", "run", expected=5, code="in_use")
    assert str(a.process.pid) in said
    assert "status" in said


async def test_a_write_to_the_copy_is_refused(pair):
    _, b = pair
    async with await NbdClient.connect(b.uri()) as client:
        with pytest.raises((GeomirrorError, OSError)):
            await client.write(0, b"x" * 4096)


# ---- Last, because after it refusals are told only once in a while.


async def test_silent_strangers_are_ended_and_do_not_keep_others_out(pair):
    a, _ = pair
    held = [socket.create_connection(("127.0.0.1", a.port), 6) for _ in range(200)]
    try:
        for channel in held:
            channel.settimeout(8)
        assert count_links(a) == 1
        await asyncio.sleep(0.5)
        # Places are limited: the oldest have been ended already, the rest are after 5 s.
        assert held[0].recv(1) == b""
    finally:
        for channel in held:
            channel.close()
    until(lambda: any("untold" in event for event in a.events("connection_refused")))
    assert a.events("node_started")
