"""Sockets handed over by a service manager: which are taken, which refused, what children see."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from geomirror.config import NbdConfig
from geomirror.errors import UsageError
from geomirror.nbd.client_io import NbdClient
from geomirror.nbd.server_io import NbdServer
from geomirror.node.activation_io import ActivatedSocket, describe_address, take_activated_sockets
from geomirror.node.nbd_listeners import check_names, is_loopback, start_nbd
from tests.nbd.ram_export import RamExport

VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
REPORT = textwrap.dedent(
    """
    import os
    from geomirror.errors import UsageError
    from geomirror.node.activation_io import describe_address, take_activated_sockets
    if os.environ.get("LISTEN_PID") == "self":
        os.environ["LISTEN_PID"] = str(os.getpid())
    try:
        found = take_activated_sockets()
    except UsageError as error:
        print("refused", error)
    else:
        print([(s.name, os.get_inheritable(s.listener.fileno())) for s in found])
    print(sorted(name for name in os.environ if name.startswith("LISTEN")))
    """
)


def handed_over(*descriptors: int, pid: str = "self", **variables: str) -> tuple[str, str]:
    """A process that gets these descriptors as 3, 4, …: what it takes, what is left to children."""
    environment = {**os.environ, "LISTEN_PID": pid, "LISTEN_FDS": str(len(descriptors))}
    environment |= variables
    # Above 3, 4, … first: one may be the target of another.
    high = [os.dup(os.dup2(fd, 100 + at)) for at, fd in enumerate(descriptors)]
    moves = "; ".join(f"os.dup2({fd}, {3 + at})" for at, fd in enumerate(high))
    code = f"import os; {moves or 'pass'}\n{REPORT}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            pass_fds=high,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    finally:
        for at, fd in enumerate(high):
            os.close(fd)
            os.close(100 + at)
    said, left = done.stdout.splitlines()
    return said, left


def listening(family: int = socket.AF_INET, where: object = ("127.0.0.1", 0)) -> socket.socket:
    found = socket.socket(family, socket.SOCK_STREAM)
    found.bind(where)  # type: ignore[arg-type]
    found.listen()
    return found


def test_unix_and_tcp_sockets_are_taken_with_their_names(tmp_path: Path) -> None:
    with listening() as tcp, listening(socket.AF_UNIX, str(tmp_path / "s")) as unix:
        said, left = handed_over(tcp.fileno(), unix.fileno(), LISTEN_FDNAMES="nbd:other")
        assert said == "[('nbd', False), ('other', False)]"
        assert left == "[]"
        said, _ = handed_over(unix.fileno())
        assert said == "[('unknown', False)]"


def test_what_is_meant_for_another_process_is_left_alone() -> None:
    with listening() as tcp:
        said, left = handed_over(tcp.fileno(), pid="1")
    assert (said, left) == ("[]", "[]")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LISTEN_FDS": "two"}, 'LISTEN_FDS is "two"'),
        ({"LISTEN_FDS": "-1"}, 'LISTEN_FDS is "-1"'),
        ({"LISTEN_FDS": "65"}, "at most 64"),
        ({"LISTEN_FDS": "9" * 30}, "not a number"),
        ({"LISTEN_PID": "self me"}, "LISTEN_PID"),
        ({"LISTEN_FDNAMES": "a:b"}, "2 names"),
        ({"LISTEN_FDNAMES": ""}, None),
    ],
)
def test_malformed_variables_are_refused(variables: dict[str, str], message: str | None) -> None:
    with listening() as tcp:
        said, left = handed_over(tcp.fileno(), **variables)
    assert (message in said) if message else (said == "[('unknown', False)]")
    assert left == "[]"


def test_descriptors_that_do_not_listen_are_refused() -> None:
    with socket.socket() as plain, socket.socket(type=socket.SOCK_DGRAM) as datagram:
        assert "does not listen" in handed_over(plain.fileno())[0]
        assert "not a stream socket" in handed_over(datagram.fileno())[0]
    with open(os.devnull) as file:
        assert "is no socket" in handed_over(file.fileno())[0]
    assert "is no socket" in handed_over(LISTEN_FDS="61")[0]


def test_nothing_is_taken_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "0" if name == "LISTEN_FDS" else str(os.getpid()))
    assert take_activated_sockets() == []
    assert not any(name in os.environ for name in VARIABLES)


def test_only_sockets_for_nbd_are_served() -> None:
    with listening() as tcp:
        for name in ("nbd", "unknown", "geomirror-nbd.socket"):
            check_names([ActivatedSocket(name, tcp)])
        with pytest.raises(UsageError, match='a socket named "http"'):
            check_names([ActivatedSocket("http", tcp)])


async def test_handed_over_sockets_are_served_and_their_paths_stay(tmp_path: Path) -> None:
    disk = RamExport(name="ram")
    own, other = tmp_path / "nbd.sock", tmp_path / "other.sock"
    unix, tcp = listening(socket.AF_UNIX, str(other)), listening()
    activated = [ActivatedSocket("nbd", unix), ActivatedSocket("nbd", tcp)]
    shown = describe_address(tcp)
    server = NbdServer(lambda: {"ram": disk})
    addresses = await start_nbd(server, NbdConfig(), str(own), activated)
    assert addresses.tcp_base_uri(None) == f"nbd://{shown}"
    assert addresses.exposed(None) == []
    for uri in (
        f"nbd+unix:///ram?socket={own}",
        f"nbd+unix:///ram?socket={other}",
        f"nbd://{shown}/ram",
    ):
        async with await NbdClient.connect(uri) as client:
            assert await client.read(0, 4) == bytes(4)
    await server.stop()
    # The service manager goes on listening on its path; ours is gone.
    assert other.is_socket()
    assert not own.exists()
    unix.close()
    tcp.close()


async def test_a_handed_over_socket_may_be_the_nodes_own(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    server = NbdServer(lambda: {"ram": RamExport(name="ram")})
    with listening(socket.AF_UNIX, str(path)) as unix:
        await start_nbd(server, NbdConfig(), str(path), [ActivatedSocket("nbd", unix)])
        async with await NbdClient.connect(f"nbd+unix:///ram?socket={path}") as client:
            assert client.size_bytes == 1 << 20
        await server.stop()
    assert path.is_socket()


async def test_tcp_beyond_this_machine_counts_as_exposed(tmp_path: Path) -> None:
    server = NbdServer(dict)
    config = NbdConfig(tcp_listen="0.0.0.0:0")
    addresses = await start_nbd(server, config, str(tmp_path / "n.sock"), [])
    await server.stop()
    assert addresses.exposed(None) == [addresses.tcp[0][1]]
    assert [
        is_loopback(host) for host in ("127.0.0.9", "::1", "::", "10.0.0.1", "fe80::1%eth0")
    ] == [
        True,
        True,
        False,
        False,
        False,
    ]
