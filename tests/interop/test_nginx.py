"""A real nginx in front of a node: a link through the lines that `docs/overlay.md` gives for it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from geomirror.lab.ports_io import free_port
from tests.interop.clients import tool
from tests.system.support import MIB, Site, create, some_sites, until, wait_applied
from tests.ways_out import Gate, self_signed

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]
DOCUMENT = Path(__file__).parents[2] / "docs" / "overlay.md"
PORT_IN_DOCUMENT = "8443"
RATE_BITS = 16_000_000
LINK_S_MAX = 60.0
"""A second, and the rest for a busy machine."""
SECRET = b"known to the two ends only; "


class Tap(Gate):
    """Between nginx and the node: remembers what nginx says there and hears."""

    def __init__(self, target: int) -> None:
        self.heard: list[bytes] = []
        super().__init__(target)

    def passed(self, data: bytes) -> None:
        self.heard.append(data)


def nginx_lines(port: int) -> str:
    """The documented location, with the port of this test."""
    (lines,) = re.findall(r"```nginx\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert f"http://127.0.0.1:{PORT_IN_DOCUMENT};" in lines
    return lines.replace(PORT_IN_DOCUMENT, str(port))


class Nginx:
    """One of its own, with everything it writes below a directory; not a service of the machine."""

    def __init__(self, root: Path, location: str) -> None:
        self.port = free_port()
        self.root = root
        certificate, key = self_signed(root)
        temporary = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "\n".join(f"{name}_temp_path {root / name};" for name in temporary)
        user = "user root;" if os.geteuid() == 0 else ""
        (root / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {root / 'nginx.pid'};\n{user}\n"
            f"error_log {root / 'error.log'};\nevents {{}}\n"
            f"http {{ access_log {root / 'access.log'};\n{paths}\n"
            f"server {{ listen 127.0.0.1:{self.port} ssl;\n"
            f"ssl_certificate {certificate}; ssl_certificate_key {key};\n{location}}} }}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [tool("nginx"), "-p", self.root, "-c", self.root / "nginx.conf"]
        command += ["-e", self.root / "error.log"]
        self._process = subprocess.Popen(command)

    def stop(self) -> None:
        """By its pid."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None


@contextmanager
def fronted(root: Path) -> Iterator[tuple[Site, Site, Nginx, Tap]]:
    """east-1 behind nginx; west-1 knows nothing but the URL."""
    plain = free_port()
    with some_sites(root, "a", "b") as (a, b), Tap(plain) as tap:
        nginx = Nginx(root, nginx_lines(tap.port))
        nginx.start()
        try:
            a.set_up(
                *("network", "create", "acme", "--site", "east", "--node", "east-1"),
                *("--listen", f"127.0.0.1:{a.port}"),
            )
            (a.data_dir / "geomirror.toml").write_text(
                f'[node]\nlisten_websocket = "127.0.0.1:{plain}"\n'
            )
            a.restart()
            token = a.set_up("token", "create", "--site", "west", "--node", "west-1").strip()
            b.data_dir.mkdir(mode=0o700)
            (b.data_dir / "geomirror.toml").write_text(
                f'[peers.east-1]\nendpoints = ["wss://127.0.0.1:{nginx.port}/geomirror"]\n'
            )
            b.set_up("join", token)
            b.restart()
            yield a, b, nginx, tap
        finally:
            nginx.stop()


def way(site: Site) -> str | None:
    (link,) = site.call("link.list")["links"]
    found: str | None = link["way"] if link["is_established"] else None
    return found


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site, Nginx, Tap]]:
    tool("nginx")
    with fronted(tmp_path) as found:
        a, b, *_ = found
        until(lambda: way(a) == "websocket" == way(b), LINK_S_MAX, "a link through nginx")
        yield found
        assert a.crashes() == b.crashes() == []


def test_a_link_through_nginx_replicates_and_outlives_it(
    sites: tuple[Site, Site, Nginx, Tap],
) -> None:
    a, b, nginx, tap = sites
    create(a, "pg")
    data = SECRET * (MIB // len(SECRET))
    asyncio.run(a.write(0, data))
    wait_applied(a)
    assert asyncio.run(b.read(0, len(data))) == data
    heard = b"".join(tap.heard)
    assert b"GET /geomirror HTTP/1.1\r\n" in heard and b"\r\nUpgrade: websocket\r\n" in heard
    assert SECRET not in heard, "what nginx decrypts is another TLS"
    assert b"west-1" not in heard
    nginx.stop()
    until(lambda: way(b) is None, LINK_S_MAX, "the link is gone")
    asyncio.run(a.write(2 * MIB, data))
    nginx.start()
    until(lambda: way(a) == "websocket" == way(b), LINK_S_MAX, "the link is back")
    wait_applied(a)
    assert asyncio.run(b.read(2 * MIB, len(data))) == data
    assert a.peer()["resyncs"] == 0


def test_the_rate_of_a_link_holds_through_nginx(sites: tuple[Site, Site, Nginx, Tap]) -> None:
    a, _, _, _ = sites
    create(a, "pg")
    wait_applied(a)
    with (a.data_dir / "geomirror.toml").open("a") as file:
        file.write(f"[links]\nrate_bits_per_second = {RATE_BITS}\n")
    assert a.process is not None
    a.process.send_signal(signal.SIGHUP)
    until(lambda: a.events("configuration_reloaded"), what="the rate is taken over")
    data = os.urandom(3 * MIB)
    began = time.monotonic()
    asyncio.run(a.write(0, data))
    wait_applied(a)
    assert time.monotonic() - began > 0.8 * len(data) * 8 / RATE_BITS
