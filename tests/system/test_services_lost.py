"""Services behind NAT, and with daemons that are killed, stopped and hang: nobody takes a part of
what was said for the whole, and everything comes back by itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.system.services import (
    Server,
    ask,
    connect,
    echo,
    exposure,
    forward,
    forwarding,
    is_reset,
    is_turned_away,
    knows,
    serving,
)
from tests.system.support import MIB, Site, count_links, some_sites, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]
Story = tuple[Site, Site, Server]
DATA = os.urandom(MIB)


@pytest.fixture(scope="module")
def behind_nat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """`a` listens; `b` does not and can only dial out. A server beside them."""
    with some_sites(tmp_path_factory.mktemp("nat"), "a", "b") as (a, b), serving(echo) as server:
        a.run(
            *("network", "create", "acme", "--site", "east", "--node", "east-1"),
            *("--listen", f"127.0.0.1:{a.port}"),
        )
        a.start()
        token = a.run("token", "create", "--site", "west", "--node", "west-1").strip()
        b.run("join", token)
        b.start()
        until(lambda: count_links(a) == 1 and count_links(b) == 1)
        yield a, b, server
        for site in (a, b):
            assert site.crashes() == [], site.name


def publish(holder: Site, user: Site, name: str, server: Server) -> int:
    holder.call("service.expose", name=name, port=server.port)
    until(lambda: knows(user, name), what=f"{user.name} knows {name}")
    return forward(user, name)


def withdraw(holder: Site, user: Site, name: str) -> None:
    user.call("service.unforward", name=name)
    holder.call("service.unexpose", name=name)


def test_either_side_may_be_the_one_that_cannot_be_dialled(behind_nat: Story) -> None:
    a, b, server = behind_nat
    for holder, user, name in ((a, b, "open"), (b, a, "hidden")):
        port = publish(holder, user, name, server)
        assert ask(port, DATA) == DATA
        for site, kind in ((holder, exposure), (user, forwarding)):
            until(lambda site=site: site.call("service.list")["circuits_open"] == 0)
            counts = kind(site, name)
            assert (counts["circuits"], counts["refused"], counts["reset"]) == (1, 0, 0)
        withdraw(holder, user, name)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
@pytest.mark.parametrize("is_holder", [True, False], ids=["holder", "user"])
def test_a_daemon_that_ends_is_a_reset_and_comes_back_with_its_rules(
    behind_nat: Story, is_holder: bool, number: signal.Signals
) -> None:
    a, b, server = behind_nat
    holder, user = b, a
    name = f"{'holder' if is_holder else 'user'}-{number.name}"
    port = publish(holder, user, name, server)
    before = server.resets
    with connect(port) as sock:
        sock.sendall(b"half a sentence")
        assert sock.recv(15) == b"half a sentence"
        victim = holder if is_holder else user
        victim.stop(number)
        assert is_reset(sock), "the client does not see an end"
    until(lambda: server.resets == before + 1, what="nor does the service")
    victim.restart()
    until(lambda: forwarding(user, name)["state"] == "listening")
    assert ask(port, DATA) == DATA
    withdraw(holder, user, name)


def test_circuits_of_a_link_that_is_dead_are_reset_and_new_ones_at_once(behind_nat: Story) -> None:
    a, b, server = behind_nat
    port = publish(b, a, "hung", server)
    assert b.process is not None
    with connect(port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        b.process.send_signal(signal.SIGSTOP)
        try:
            until(lambda: count_links(a) == 0, what="the link is declared dead")
            assert is_turned_away(port)
            began = time.monotonic()
            assert is_turned_away(port)
            assert time.monotonic() - began < 2
            assert "west-1 is not connected" in str(forwarding(a, "hung")["last_error"])
            assert forwarding(a, "hung")["state"] == "waiting"
            assert is_reset(sock)
            assert "the link is down" in str(forwarding(a, "hung")["last_error"])
        finally:
            b.process.send_signal(signal.SIGCONT)
    until(lambda: count_links(a) == 1)
    assert ask(port, DATA) == DATA
    until(lambda: b.call("service.list")["circuits_open"] == 0)
    withdraw(b, a, "hung")
