"""A daemon whose NBD socket is made by the service manager."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from geomirror.nbd.client_io import NbdClient
from tests.system.activation import listen_unix, start_with_socket
from tests.system.support import some_sites, until

pytestmark = pytest.mark.system


async def test_clients_of_the_handed_over_socket_wait_for_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with some_sites(tmp_path, "east-1") as (site,), listen_unix(path) as listener:
        site.run("network", "create", "acme", "--site", "east", "--node", "east-1")
        (site.data_dir / "geomirror.toml").write_text(f'[node]\nlisten = "127.0.0.1:{site.port}"\n')
        (site.data_dir / "geomirror.toml").chmod(0o600)
        with site.log_path.open("ab") as log:
            site.process = start_with_socket(site.command("node", "run"), listener, stderr=log)
        until(site._answers, what="start")
        site.run("resource", "create", "pg", "--size", "16M", "--primary", "east-1")
        async with await NbdClient.connect(f"nbd+unix:///pg?socket={path}") as client:
            await client.write(0, b"through systemd's socket")
        assert await site.read(0, 7) == b"through"
        assert site.stop() == 0
        # The socket outlives the daemon: the next start serves who connects now.
        assert path.is_socket()
        with site.log_path.open("ab") as log:
            site.process = start_with_socket(site.command("node", "run"), listener, stderr=log)
        uri = f"nbd+unix:///pg?socket={path}"
        until(site._answers, what="second start")
        until(lambda: site.uri(), what="served again")
        async with await NbdClient.connect(uri, timeout_s=60) as client:
            assert await client.read(0, 7) == b"through"
        assert site.stop(signal.SIGTERM) == 0
        assert site.crashes() == []


def test_a_socket_for_something_else_stops_the_start(tmp_path: Path) -> None:
    with some_sites(tmp_path, "east-1") as (site,), listen_unix(tmp_path / "s") as listener:
        site.run("network", "create", "acme", "--site", "east", "--node", "east-1")
        process = start_with_socket(
            site.command("node", "run"), listener, name="http", stderr=subprocess.PIPE
        )
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2
        assert b'socket named "http"' in said
        assert b"FileDescriptorName=nbd" in said
