"""Services of one node on ports of another: what applications see, with real daemons."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.system.services import (
    answer_at_the_end,
    ask,
    connect,
    echo,
    exposure,
    forward,
    forwarding,
    is_reset,
    is_turned_away,
    knows,
    never_read,
    publish,
    reset,
    serving,
)
from tests.system.support import MIB, Site, create, make_network, some_sites, until, wait_applied

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
Pair = tuple[Site, Site]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with some_sites(tmp_path_factory.mktemp("pair"), "a", "b") as (a, b):
        make_network(a, b)
        yield a, b
        for site in (a, b):
            assert site.crashes() == []
            assert site.stop() == 0


def test_bytes_go_there_and_back_and_the_words_are_true(pair: Pair) -> None:
    a, b = pair
    with serving(echo) as server:
        text = a.run("expose", "echo", "--port", str(server.port))
        assert f'"echo" is exposed: 127.0.0.1:{server.port}, to every node' in text
        until(lambda: knows(b, "echo"))
        found = b.json("forward", "echo", "0")
        assert (found["nearest"], found["state"]) == ("east-1", "listening")
        port = int(found["listen"].rpartition(":")[2])
        data = os.urandom(3 * MIB + 17)
        assert ask(port, data) == data
        here = until(lambda: forwarding(b, "echo")["circuits_open"] == 0 and forwarding(b, "echo"))
        assert (here["circuits"], here["bytes_sent"], here["reset"]) == (1, len(data), 0)
        assert here["bytes_received"] == exposure(a, "echo")["bytes_sent"] == len(data)
        assert "east-1" in b.run("service", "list")
        assert "no circuit" in b.run("service", "circuits")
        with connect(port) as sock:
            sock.sendall(b"hello")
            assert sock.recv(5) == b"hello"
            assert f"127.0.0.1:{port}" in b.run("service", "circuits")
            (there,) = a.json("service", "circuits")["circuits"]
            assert (there["node"], there["direction"]) == ("west-1", "expose")
        assert f"{port}" in b.run("unforward", "echo")
        with pytest.raises(ConnectionRefusedError):
            connect(port)
        a.run("unexpose", "echo")


def test_a_hundred_mebibytes_each_way_at_once(pair: Pair) -> None:
    a, b = pair
    block = random.Random(3).randbytes(MIB)
    with serving(echo) as server:
        port = publish(a, b, "bulk", server.port)
        with connect(port) as sock:
            sent, received = hashlib.sha256(), hashlib.sha256()

            def send() -> None:
                for i in range(100):
                    piece = block[i:] + block[:i]
                    sent.update(piece)
                    sock.sendall(piece)
                sock.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            count = 0
            while data := sock.recv(1 << 18):
                received.update(data)
                count += len(data)
            sender.join()
        assert (count, received.digest()) == (100 * MIB, sent.digest())
    b.run("unforward", "bulk")
    a.run("unexpose", "bulk")


def test_an_end_is_an_end_and_a_reset_a_reset(pair: Pair) -> None:
    a, b = pair
    with serving(answer_at_the_end) as server:
        port = publish(a, b, "ends", server.port)
        assert ask(port, b"x" * (5 * MIB)) == f"{5 * MIB} bytes".encode()
        with connect(port) as sock:
            sock.sendall(b"reset!")
            assert is_reset(sock), "the service's reset reaches the client"
        sock = connect(port)
        sock.sendall(b"abc")
        until(lambda: len(server.connections) == 3)
        reset(sock)
        until(lambda: server.resets == 1, what="the client's reset reaches the service")
    # The service is gone now: nothing listens at its port.
    assert is_turned_away(port)
    assert "Connection refused" in str(forwarding(b, "ends")["last_error"])
    assert "Connection refused" in str(exposure(a, "ends")["last_error"])
    b.run("unforward", "ends")
    a.run("unexpose", "ends")


def test_only_who_may_gets_through_and_only_to_what_is_exposed(pair: Pair) -> None:
    a, b = pair
    with serving(echo) as server:
        shut = forward(b, "nothing")
        assert is_turned_away(shut)
        assert "no other node is known to expose" in str(forwarding(b, "nothing")["last_error"])
        a.run("expose", "mine", "--port", str(server.port), "--allow", "east-1")
        refused = forward(b, "mine")
        assert is_turned_away(refused)
        assert not any(s["holders"] for s in b.call("service.list")["services"])
        a.run("expose", "mine", "--port", str(server.port), "--allow", "west-1")
        until(lambda: knows(b, "mine"))
        sock = connect(refused)
        sock.sendall(b"once")
        assert sock.recv(4) == b"once"
        a.run("expose", "mine", "--port", str(server.port), "--allow", "east-1")
        assert is_reset(sock), "who may not any more is cut off"
        sock.close()
        assert is_turned_away(refused)
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = str(other.getsockname()[1])
            text = b.error("forward", "mine", taken, expected=5, code="in_use")
            assert "another process listens there" in text
        assert "no node" in a.error(
            *("expose", "mine", "--port", "5", "--allow", "nobody"), expected=4, code="not_found"
        )
        a.error("expose", "-x-", "--port", "5", expected=2, code="usage")
        a.error("expose", "x", "--port", "70000", expected=2, code="usage")
        a.error("unexpose", "never", expected=4, code="not_found")
        b.error("unforward", "never", expected=4, code="not_found")
    b.run("unforward", "mine", str(refused))
    b.run("unforward", "nothing")
    a.run("unexpose", "mine")


def test_many_at_once(pair: Pair) -> None:
    a, b = pair
    with serving(echo) as server:
        port = publish(b, a, "many", server.port)
        answers: dict[int, bool] = {}

        def one(i: int) -> None:
            data = random.Random(i).randbytes(20_000 + i)
            answers[i] = ask(port, data) == data

        threads = [threading.Thread(target=one, args=(i,)) for i in range(120)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [i for i in range(120) if not answers.get(i)] == []
        until(lambda: a.call("service.list")["circuits_open"] == 0)
    a.run("unforward", "many")
    b.run("unexpose", "many")


def test_an_application_that_reads_nothing_holds_up_nobody_else(pair: Pair) -> None:
    a, b = pair
    create(a, "pg", size="16M")
    with serving(never_read) as stuck, serving(echo) as server:
        ports = publish(b, a, "stuck", stuck.port), publish(b, a, "lively", server.port)
        sock = connect(ports[0])
        sock.settimeout(2)
        with pytest.raises(TimeoutError):
            while True:
                sock.sendall(bytes(MIB))
        held = forwarding(a, "stuck")["bytes_sent"]
        asyncio.run(a.write(0, os.urandom(8 * MIB)))
        wait_applied(a, timeout_s=20)
        assert ask(ports[1], b"x" * MIB) == b"x" * MIB
        assert forwarding(a, "stuck")["bytes_sent"] == held, "it is full, and stays so"
        # A reset is noticed although nothing can be read.
        reset(sock)
        until(lambda: a.call("service.list")["circuits_open"] == 0, 10)
        until(lambda: b.call("service.list")["circuits_open"] == 0, 10)
    for name in ("stuck", "lively"):
        a.run("unforward", name)
        b.run("unexpose", name)
