"""Applications talk over virtual addresses, through real wireguard-go between two namespaces.

One pair of hosts for the whole file; every story begins and ends with tunnels that are up.
"""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.errors import UnreachableError
from tests.system.support import until
from tests.system.virtual_network import (
    SOCKETS,
    Host,
    connection,
    ip,
    make_virtual_network,
    need_tunnels,
    transfer,
    two_hosts,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]
DATA = random.Random(7).randbytes(1 << 20)
CONFIG = '[tunnel]\ndriver = "wireguard"\nhosts_file = "{}"\n'
HOSTS = "127.0.0.1 localhost\n"
UP_S_MAX = 40.0
"""Keys over the link, a process, a handshake: a second. The rest is for a busy machine."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    need_tunnels()
    root = tmp_path_factory.mktemp("virtual")
    (root / "hosts").write_text(HOSTS)
    with two_hosts(root) as (a, b):
        for host in (a, b):
            add_foreign(host)
            host.before = host.picture()
        make_virtual_network(a, b, CONFIG.format(root / "hosts"))
        yield a, b
        assert a.stop() == b.stop() == 0
        assert a.crashes() == b.crashes() == []
        no_process_is_left(a, b)


@pytest.fixture
def pair(shared: tuple[Host, Host]) -> Iterator[tuple[Host, Host]]:
    """Both daemons run, linked, and both say that the tunnel is up."""
    for host in shared:
        until(host.is_through, UP_S_MAX, f"tunnel of {host.name}")
    yield shared
    for host in shared:
        if host.process is None:
            host.restart()
        host.call("tunnel.up")


def add_foreign(host: Host) -> None:
    """What others might have on a host, as similar to ours as can be."""
    n = host.namespace.name
    ip("-n", n, "address", "add", "10.99.0.1/32", "dev", "lo")
    ip("-n", n, "route", "add", "unreachable", "10.99.8.0/24", "table", "7100", "protocol", "201")
    ip("-n", n, "route", "add", "unreachable", "10.99.9.0/24", "table", "7100")
    ip("-n", n, "rule", "add", "to", "10.99.8.0/24", "lookup", "7100", "priority", "7100")
    ip("-n", n, "rule", "add", "to", "10.99.0.0/16", "lookup", "main", "priority", "7099")
    ip("-n", n, "tuntap", "add", "dev", "gm0", "mode", "tun")


def addresses(host: Host) -> list[str]:
    found = host.tunnel()
    return [found["address"], found["address_ipv6"]]


def everything_works(a: Host, b: Host) -> None:
    for source, target in ((a, b), (b, a)):
        for own, address in zip(addresses(source), addresses(target), strict=True):
            assert source.ping(address), address
            found, origin = transfer(source, target, address, DATA)
            assert found == DATA
            assert origin == own  # not an address of the underlay


def processes(*hosts: Host) -> list[int]:
    """Processes of wireguard-go that serve interfaces of these nodes."""
    tags = [host.tag for host in hosts]
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.decode(errors="replace").startswith(tag) for word in words for tag in tags):
            found.append(int(path.parent.name))
    return found


def no_process_is_left(*hosts: Host) -> None:
    until(lambda: not processes(*hosts), what="no wireguard-go")
    assert [p for p in SOCKETS.glob("gm*.sock") for h in hosts if p.name.startswith(h.tag)] == []


def test_ping_and_tcp_both_ways_over_both_families(pair: tuple[Host, Host]) -> None:
    a, b = pair
    everything_works(a, b)
    # A packet of the whole MTU goes through, a larger one is not swallowed in silence.
    for address in addresses(b):
        assert a.ping(address, size=1280)
        assert not a.ping(address, size=1281)
    text = a.run("tunnel", "status")
    assert "tunnels    up by wireguard-go" in text
    assert addresses(b)[0] in text


def test_both_nodes_are_in_the_hosts_file_by_name(pair: tuple[Host, Host]) -> None:
    text = (pair[0].root / "hosts").read_text()
    assert text.startswith(HOSTS)
    for host, name in zip(pair, ("east-1", "west-1"), strict=True):
        for address in addresses(host):
            assert text.count(f"{address} {name}.acme.internal\n") == 2  # each node keeps its own


def test_a_killed_wireguard_go_comes_back_by_itself(pair: tuple[Host, Host]) -> None:
    a, b = pair
    old = a.pid()
    os.kill(old, signal.SIGKILL)
    until(lambda: a.pid() not in (None, old), UP_S_MAX, "another process")
    until(lambda: a.ping(addresses(b)[0], wait_s=0.3), UP_S_MAX, "pings go through")
    everything_works(a, b)
    assert a.events("tunnel_process_ended")


def test_a_restarted_daemon_keeps_addresses_and_leaks_nothing_meanwhile(
    pair: tuple[Host, Host],
) -> None:
    a, b = pair
    before, peer = addresses(b), addresses(a)
    here, there = connection(a, b, before[0])
    assert b.stop() == 0
    no_process_is_left(b)
    for own, address in zip(before, peer, strict=True):
        # Its own address still is; what would go out goes nowhere, at once.
        assert b.ping(own)
        began = time.monotonic()
        assert not b.ping(address, wait_s=5)
        assert time.monotonic() - began < 2
    b.restart()
    assert addresses(b) == before
    until(lambda: b.ping(peer[0], wait_s=0.3), UP_S_MAX, "pings go through")
    everything_works(a, b)
    # A connection from before goes on.
    with here, there:
        for source, target in ((here, there), (there, here)):
            source.sendall(b"still there?")
            assert target.recv(100) == b"still there?"


def test_keys_are_replaced_under_a_connection(pair: tuple[Host, Host]) -> None:
    a, b = pair
    old_key, old_secrets = b.neighbour()["public_key"], set(secrets(a))
    here, there = connection(a, b, addresses(b)[0])
    here.sendall(b"before")
    assert there.recv(6) == b"before"
    found = a.json("tunnel", "rotate-keys")
    assert (found["told"], found["not_told"]) == (["west-1"], [])
    here.sendall(b"after!")
    assert there.recv(6) == b"after!"
    until(lambda: b.neighbour()["public_key"] == found["public_key"] != old_key, UP_S_MAX, "it")
    until(lambda: a.is_through() and b.is_through(), UP_S_MAX, "both see a new session")
    there.sendall(b"back")
    assert here.recv(4) == b"back"
    for sock in (here, there):
        sock.close()
    # Key and share are new: the old ones open nothing.
    assert len(old_secrets - set(secrets(a))) >= 2
    everything_works(a, b)


def test_down_takes_everything_away_and_nothing_else(pair: tuple[Host, Host]) -> None:
    a, b = pair
    removed = a.json("tunnel", "down")["removed"]
    assert any(words.startswith("interface gm") for words in removed)
    assert a.picture() == a.before
    assert (a.root / "hosts").read_text().count("BEGIN geomirror") == 1
    assert a.tunnel()["state"] == "down"
    assert a.tunnel()["neighbours"][0]["state"] == "down"
    assert a.json("tunnel", "down")["removed"] == []
    no_process_is_left(a)
    assert a.json("tunnel", "up")["state"] == "up"
    until(lambda: a.ping(addresses(b)[0], wait_s=0.3), UP_S_MAX, "pings go through")
    everything_works(a, b)


def test_down_without_a_daemon_takes_away_what_a_crash_has_left(pair: tuple[Host, Host]) -> None:
    a, b = pair
    b.kill()
    until(lambda: not processes(b), what="the kernel ends its processes")
    assert b.picture() != b.before
    removed = b.json("tunnel", "down")["removed"]
    assert removed
    assert b.picture() == b.before
    no_process_is_left(b)
    assert b.json("tunnel", "down")["removed"] == []
    b.restart()
    until(b.is_through, UP_S_MAX, "the tunnel is up again")
    everything_works(a, b)


def test_what_others_change_is_put_right(pair: tuple[Host, Host]) -> None:
    a, b = pair
    n, target = a.namespace.name, addresses(b)[0]
    ip("-n", n, "-4", "rule", "delete", "priority", "7100", "to", "10.77.0.0/16")
    ip("-n", n, "link", "set", "dev", a.neighbour()["interface"], "down")
    ip("-n", n, "address", "delete", f"{addresses(a)[0]}/32", "dev", "lo")
    assert not a.ping(target, wait_s=0.3)
    until(lambda: a.ping(target, wait_s=0.3), UP_S_MAX, "pings go through")
    everything_works(a, b)


def test_a_network_of_the_host_inside_of_the_range_is_refused(pair: tuple[Host, Host]) -> None:
    a, _ = pair
    a.call("tunnel.down")
    ip("-n", a.namespace.name, "route", "add", "10.77.200.0/24", "dev", "eth0")
    said = a.error("tunnel", "up", expected=5, code="refused")
    assert "10.77.200.0/24 on eth0" in said
    assert a.tunnel()["state"] == "down"
    ip("-n", a.namespace.name, "route", "delete", "10.77.200.0/24")
    assert a.picture() == a.before


def test_a_tunnel_through_which_nothing_comes_is_silent(pair: tuple[Host, Host]) -> None:
    a, b = pair
    os.kill(b.pid(), signal.SIGSTOP)
    assert b.process is not None
    try:
        until(lambda: a.neighbour()["state"] == "silent", 60, "nothing comes")
    finally:
        os.kill(b.pid(), signal.SIGCONT)
    until(a.is_through, UP_S_MAX, "it is heard again")


def secrets(host: Host) -> list[str]:
    """Everything that must not be seen, as it is written in files and by `wg`."""
    book = json.loads((host.data_dir / "tunnel/wireguard.json").read_text())
    shares = [n[key] for n in book["neighbours"].values() for key in ("share", "peer_share")]
    dump = host.namespace.command("wg", "show", host.neighbour()["interface"], "dump")
    said = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    lines = [line.split("\t") for line in said.splitlines()]
    found = [book["private_key"], *shares, lines[0][0], lines[1][1]]
    assert lines[0][0] == book["private_key"]
    return [*found, *(base64.b64decode(text).hex() for text in found)]


def test_secrets_are_in_private_files_only(pair: tuple[Host, Host]) -> None:
    a, b = pair
    a.call("tunnel.down")
    a.call("tunnel.up")
    until(a.is_through, UP_S_MAX, "the tunnel is up again")
    hidden = secrets(a) + secrets(b)
    assert len(set(hidden)) >= 8
    shown = [a.run("tunnel", "status", "--json"), a.run("network", "show", "--json")]
    shown += [a.log(), b.log(), json.dumps(a.events("tunnel_up"))]
    for pid in [*processes(a, b), a.process.pid]:  # type: ignore[union-attr]
        shown += [Path(f"/proc/{pid}/{name}").read_text() for name in ("cmdline", "environ")]
    for path in a.root.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o077:
            shown.append(path.read_text(errors="replace"))
    for text in shown:
        assert not [secret for secret in hidden if secret in text]
    for host in pair:
        path = host.data_dir / "tunnel/wireguard.json"
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_commands_without_a_daemon_say_so(pair: tuple[Host, Host]) -> None:
    a, _ = pair
    assert a.stop() == 0
    a.error("tunnel", "up", expected=3, code="unreachable")
    with pytest.raises(UnreachableError):
        a.tunnel()
