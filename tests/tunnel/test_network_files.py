"""The network's files: refused when too open or damaged, replaced whole, changed under a lock."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from network_kit import HOUR, ShiftedClock, all_paths, found, token_of

from geomirror.environment import SeededEntropy
from geomirror.errors import ConfigError, IntegrityError, NotFoundError, StorageError
from geomirror.tunnel.authority_io import (
    create_token,
    install_renewal,
    list_tokens,
    renew,
    renewal_request,
    set_endpoints,
)
from geomirror.tunnel.key_files_io import FILE_BYTES_MAX, locked, read_file, write_file
from geomirror.tunnel.network_io import create_network, load_network


@pytest.mark.parametrize(
    "name", ["identity/node.key", "authority/authority.key", "network/membership.json"]
)
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o602])
def test_a_file_that_others_can_use_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, name: str, mode: int
) -> None:
    found(tmp_path, ShiftedClock())
    (tmp_path / name).chmod(mode)
    with pytest.raises(ConfigError, match=rf"chmod 600 {tmp_path / name}"):
        load_network(tmp_path)


def test_a_directory_that_others_can_use_is_refused(tmp_path: Path) -> None:
    found(tmp_path, ShiftedClock())
    (tmp_path / "identity").chmod(0o755)
    with pytest.raises(ConfigError, match=rf"mode 0755.*chmod 700 {tmp_path / 'identity'}"):
        load_network(tmp_path)


def test_an_empty_directory_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"geomirror network create.*geomirror join"):
        load_network(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "identity/node.key",
        "identity/node.crt",
        "identity/authority.crt",
        "authority/authority.key",
        "network/network.json",
        "network/membership.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"\xff\x00junk", b'[{"kind":"\xff"}]'])
def test_a_damaged_file_is_an_integrity_error(tmp_path: Path, name: str, content: bytes) -> None:
    found(tmp_path, ShiftedClock())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IntegrityError):
        load_network(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["identity/node.key", "identity/node.crt", "identity/authority.crt", "authority/authority.key"],
)
def test_a_file_of_another_node_does_not_fit(tmp_path: Path, name: str) -> None:
    found(tmp_path / "a", ShiftedClock())
    found(tmp_path / "b", ShiftedClock())
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(IntegrityError):
        load_network(tmp_path / "a")


def test_a_damaged_token_book_is_an_integrity_error(tmp_path: Path) -> None:
    site = found(tmp_path, ShiftedClock())
    for content in (b"", b"{}", b'[{"token_id":"\xff"}]'):
        (tmp_path / "authority" / "tokens.json").write_bytes(content)
        with pytest.raises(IntegrityError, match=r"tokens\.json is damaged"):
            token_of(site)


def test_a_creation_that_crashed_can_be_repeated(tmp_path: Path) -> None:
    clock = ShiftedClock()
    found(tmp_path, clock)
    (tmp_path / "network" / "network.json").unlink()  # it is written last
    again = found(tmp_path, clock)
    assert load_network(tmp_path).identity.node_id == again.state.identity.node_id


def test_a_failed_write_leaves_the_old_content_and_no_litter_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    (tmp_path / ".file.new").write_bytes(b"left by a crash")
    write_file(path, b"new")
    assert read_file_of(tmp_path, path) == b"new"
    with pytest.raises(StorageError):
        write_file(tmp_path / "missing" / "file", b"x")
    assert [p.name for p in all_paths(tmp_path)] == ["file"]


def read_file_of(directory: Path, path: Path) -> bytes:
    directory.chmod(0o700)
    return read_file(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    write_file(tmp_path / "file", b"x" * (FILE_BYTES_MAX + 1))
    with pytest.raises(StorageError, match="larger than"):
        read_file(tmp_path / "file")


def test_the_lock_excludes_another_thread_of_the_same_process(tmp_path: Path) -> None:
    order: list[str] = []
    is_inside = threading.Event()

    def other() -> None:
        is_inside.wait(5)
        with locked(tmp_path / "lock"):
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    with locked(tmp_path / "lock"):
        is_inside.set()
        thread.join(0.05)
        order.append("first")
    thread.join(5)
    assert order == ["first", "other"]


def test_tokens_made_by_two_processes_at_once_are_all_kept(tmp_path: Path) -> None:
    site = found(tmp_path, ShiftedClock())
    states = [load_network(tmp_path) for _ in range(4)]

    def make(number: int) -> None:
        for count in range(5):
            create_token(
                states[number],
                site="west",
                node=f"n-{number}-{count}",
                wall_ns=site.clock.wall_ns(),
                entropy=SeededEntropy(f"{number}/{count}"),
            )

    threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    names = {record.node for record in list_tokens(site.state)}
    assert names == {f"n-{number}-{count}" for number in range(4) for count in range(5)}


def test_a_renewal_over_a_link_fits_only_the_node_that_asked(tmp_path: Path) -> None:
    clock = ShiftedClock()
    site = found(tmp_path, clock)
    clock.shift_ns = 13 * HOUR
    entropy = SeededEntropy("renewal")
    old = site.state.claims
    reply = renew(
        site.state,
        "east-1",
        renewal_request(site.state),
        wall_ns=clock.wall_ns(),
        entropy=entropy,
    )
    install_renewal(site.state, reply, wall_ns=clock.wall_ns())
    assert site.state.claims.not_after_ns >= old.not_after_ns + 12 * HOUR
    assert load_network(tmp_path).claims == site.state.claims
    assert token_of(site)


def test_endpoints_can_change_and_the_change_is_signed(tmp_path: Path) -> None:
    site = found(tmp_path, ShiftedClock())
    changed = set_endpoints(site.state, "east-1", ["198.51.100.9:7701"])
    assert changed.version == 2
    assert set_endpoints(site.state, "east-1", ["198.51.100.9:7701"]).version == 2
    member = load_network(tmp_path).membership.find("east-1")
    assert member is not None
    assert member.endpoints == ("198.51.100.9:7701",)


def test_listening_on_every_address_is_told_to_others_as_one_that_they_can_dial(
    tmp_path: Path,
) -> None:
    state = create_network(
        tmp_path,
        network="acme",
        site="east",
        node=None,
        listen="0.0.0.0:7701",
        cidr="10.9.0.0/16",
        clock=ShiftedClock(),
        entropy=SeededEntropy(1),
    )
    member = state.membership.find(state.node)
    assert member is not None
    host, port = member.endpoints[0].rsplit(":", 1)
    assert host != "0.0.0.0"
    assert port == "7701"
    assert member.address.startswith("10.9.")
