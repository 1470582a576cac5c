"""Two daemons with a firewall between them: through a proxy, inside a WebSocket, and back again."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from geomirror.lab.ports_io import free_port
from tests.system.support import Site, create, some_sites, until, wait_applied
from tests.ways_out import Gate, Inspector, Proxy, Server, self_signed

pytestmark = pytest.mark.system
BLOCK = 64 * 1024


def link(site: Site) -> dict:
    """The only link of a node."""
    (found,) = site.call("link.list")["links"]
    return found


def way(site: Site) -> str | None:
    return link(site)["way"]


@contextmanager
def firewalled(root: Path) -> Iterator[tuple[Site, Site, Gate, Proxy, int]]:
    """east-1 listens; west-1 only dials out, through the gate or the proxy."""
    with some_sites(root, "a", "b") as (a, b), Gate(a.port) as gate:
        proxy = Proxy({gate.endpoint: a.port}, credentials="west:s3cret-0815")
        with proxy:
            web = free_port()
            a.set_up(
                *("network", "create", "acme", "--site", "east", "--node", "east-1"),
                *("--listen", f"127.0.0.1:{a.port}"),
            )
            certificate, key = self_signed(root)
            (a.data_dir / "geomirror.toml").write_text(
                f'[node]\nlisten_websocket = "127.0.0.1:{web}"\n'
                f'websocket_certificate = "{certificate}"\nwebsocket_key = "{key}"\n'
            )
            a.restart()
            token = a.set_up("token", "create", "--site", "west", "--node", "west-1").strip()
            b.set_up("join", token)
            yield a, b, gate, proxy, web


def configure(site: Site, gate: Server, *more: str, proxy: Proxy | None = None) -> None:
    endpoints = json.dumps([gate.endpoint, *more])
    text = f"[peers.east-1]\nendpoints = {endpoints}\n"
    if proxy is not None:
        text += f'[links]\nproxy = "{proxy.endpoint}"\nproxy_credentials = "proxy"\n'
        (site.data_dir / "proxy").touch(0o600)
        (site.data_dir / "proxy").write_text("west:s3cret-0815\n")
    (site.data_dir / "geomirror.toml").write_text(text)


class Writer:
    """Writes and remembers what is on the volume."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._count = 0
        self.expected: dict[int, bytes] = {}

    def write(self, count: int = 8) -> None:
        for _ in range(count):
            self._count += 1
            data = self._count.to_bytes(4, "big") * (BLOCK // 4)
            at = self._count * 7 % 200 * BLOCK
            asyncio.run(self._site.write(at, data))
            self.expected[at] = data

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Writes all the time; each has to be answered."""
        stopping = threading.Event()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while not stopping.wait(0.05):
                    self.write(1)
            except BaseException as error:
                failures.append(error)
                raise

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join(30)
        assert not failures and not thread.is_alive()

    def check(self, copy: Site) -> None:
        wait_applied(self._site)
        for at, data in self.expected.items():
            assert asyncio.run(copy.read(at, BLOCK)) == data
        peer = self._site.peer()
        assert peer["resyncs"] == 0 and peer["state"] == "Stream", peer


def wait_way(site: Site, kind: str, seconds: float, what: str) -> float:
    began = time.monotonic()
    until(lambda: way(site) == kind, seconds, what)
    return time.monotonic() - began


def test_replication_goes_on_through_a_proxy_and_returns(tmp_path: Path) -> None:
    with firewalled(tmp_path) as (a, b, gate, proxy, _web):
        configure(b, gate, proxy=proxy)
        b.restart()
        until(lambda: way(b) == "direct" and way(a) == "direct", what="a direct link")
        create(a, "pg")
        writer = Writer(a)
        writer.write()
        writer.check(b)
        assert link(b)["way_reason"] == ""

        with writer.going_on():
            gate.close()  # refused
            took_s = wait_way(b, "proxy", 5, "fallback when refused")
            until(lambda: way(a) == "proxy", 5)
            assert "refused" in link(b)["way_reason"]
            assert proxy.requests
        writer.check(b)

        with writer.going_on():
            gate.open()
            returned_s = wait_way(b, "direct", 60, "return to the direct path")
        writer.check(b)

        with writer.going_on():
            gate.swallow()
            hole_s = wait_way(b, "proxy", 5, "fallback out of a black hole")
        writer.check(b)
        with writer.going_on():
            gate.let_through()
            wait_way(b, "direct", 60, "return after the black hole")
        writer.check(b)
        print(f"fallback {took_s:.2f} s, black hole {hole_s:.2f} s, return {returned_s:.1f} s")

        secrets = ("s3cret-0815", "d2VzdDpzM2NyZXQtMDgxNQ")
        said = b.log() + json.dumps(b.call("link.list")) + json.dumps(b.events("link_up"))
        assert b.process is not None
        said += Path(f"/proc/{b.process.pid}/cmdline").read_text()
        said += Path(f"/proc/{b.process.pid}/environ").read_text()
        assert not any(secret in said for secret in secrets)
        assert a.crashes() == b.crashes() == []


def test_replication_goes_on_inside_a_websocket(tmp_path: Path) -> None:
    with firewalled(tmp_path) as (a, b, gate, _, web):
        gate.close()
        configure(b, gate, f"wss://127.0.0.1:{web}/geomirror")
        b.restart()
        wait_way(b, "websocket", 20, "a link inside a WebSocket")
        until(lambda: way(a) == "websocket", 5)
        create(a, "pg")
        writer = Writer(a)
        writer.write(40)
        writer.check(b)
        shown = b.run("link", "list")
        assert "websocket" in shown and "refused" in shown, shown
        events = len(b.events("link_down"))
        gate.open()
        wait_way(b, "direct", 60, "return to the direct path")
        writer.write()
        writer.check(b)
        assert len(b.events("link_down")) == events + 1
        assert a.crashes() == b.crashes() == []


def test_doctor_tells_what_is_wrong(tmp_path: Path) -> None:
    with firewalled(tmp_path) as (_, b, gate, proxy, _web):
        configure(b, gate, proxy=proxy)
        found = b.json("doctor", expected=3)
        codes = [f["code"] for f in found["findings"] if f["is_problem"]]
        assert codes == ["daemon_down"] and found["exit_code"] == 3
        b.restart()
        until(lambda: way(b) == "direct", what="a link")
        assert b.json("doctor", "east-1")["exit_code"] == 0
        assert "nothing is wrong" in b.run("doctor")
        gate.close()
        wait_way(b, "proxy", 10, "fallback")
        shown = b.run("doctor")  # a notice: the other path works
        assert "notice" in shown and "nobody listens" in shown and "next: on" in shown
        (b.data_dir / "proxy").write_text("west:wrong\n")
        proxy.close()
        proxy.open()
        until(lambda: way(b) is None or way(b) == "proxy", 10)
        b.stop()
        found = b.json("doctor", expected=11)
        codes = {f["code"] for f in found["findings"] if f["is_problem"]}
        assert codes == {"daemon_down", "refused", "proxy_wants_credentials"}
        assert b.error("doctor", "nobody", expected=4, code="not_found")
        (b.data_dir / "proxy").chmod(0o644)
        assert "chmod 600" in b.error("doctor", expected=2, code="config")
        assert "s3cret" not in shown + json.dumps(found)


def test_a_firewall_that_opens_tls_is_named_and_got_around(tmp_path: Path) -> None:
    with firewalled(tmp_path) as (a, b, gate, _, web):
        certificate = self_signed(tmp_path / "firewall", "firewall.example")
        with Inspector(*certificate, inside=web) as inspector:
            gate.close()
            configure(b, inspector, f"wss://{inspector.endpoint}/geomirror")
            b.restart()
            wait_way(b, "websocket", 20, "a link inside of what the firewall opens")
            create(a, "pg")
            writer = Writer(a)
            writer.write()
            writer.check(b)
            found = b.json("doctor", "east-1")["findings"]
            (named,) = [f for f in found if f["code"] == "intercepted"]
            assert "firewall.example" in named["text"] and not named["is_problem"]
            assert "not of this network" in link(b)["way_reason"]
        assert a.crashes() == b.crashes() == []


def test_a_forward_goes_where_the_link_goes(tmp_path: Path) -> None:
    class Echo(Server):
        def serve(self, sock) -> None:
            while data := sock.recv(1 << 16):
                sock.sendall(data)

    with firewalled(tmp_path) as (a, b, gate, _, web), Echo() as echo:
        gate.close()
        configure(b, gate, f"wss://127.0.0.1:{web}/geomirror")
        b.restart()
        wait_way(b, "websocket", 20, "a link inside a WebSocket")
        a.run("expose", "echo", "--port", str(echo.port))
        port = free_port()
        b.run("forward", "echo", str(port))
        client = Server.connect(echo, port)
        client.settimeout(20)
        data = bytes(range(256)) * 4096
        client.sendall(data[: 1 << 16])
        back = b""
        while len(back) < 1 << 16:
            back += client.recv(1 << 16)
        assert back == data[: 1 << 16]
        client.close()
