"""The nodes' names in a hosts file: our lines come and go, everything else stays as it is."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.errors import RefusedError, StorageError
from geomirror.tunnel.hosts_block import with_block
from geomirror.tunnel.hosts_file_io import update_hosts

OWN = "acme/00ff"
OLD = b"127.0.0.1\tlocalhost\n::1 localhost ip6-localhost\n"
LINES = ["10.77.0.1 east-1.acme.internal", "10.77.0.2 west-1.acme.internal"]
FOREIGN = st.lists(st.binary(max_size=30).filter(lambda b: b"geomirror" not in b), max_size=5)


@given(FOREIGN, st.booleans(), st.lists(st.sampled_from(LINES), max_size=2))
def test_a_block_comes_changes_and_goes_and_leaves_the_rest(parts, ends, lines):
    text = b"\n".join(parts) + (b"\n" if ends else b"")
    once = with_block(text, OWN, lines)
    assert with_block(once, OWN, lines) == once
    assert all(line.encode() in once for line in lines)
    gone = with_block(once, OWN, [])
    # One line end may have been added to a last line that had none.
    assert gone in (text, text + b"\n")


def test_a_block_keeps_its_place_and_others_keep_theirs():
    text = with_block(with_block(OLD, OWN, LINES), "acme/1111", LINES[:1]) + b"192.0.2.1 after\n"
    changed = with_block(text, OWN, LINES[1:])
    assert changed == text.replace(LINES[0].encode() + b"\n" + LINES[1].encode(), LINES[1].encode())
    assert with_block(changed, "acme/1111", []).count(b"BEGIN") == 1


@pytest.mark.parametrize(
    "text",
    [
        "# BEGIN geomirror acme/00ff\n",
        "# END geomirror acme/00ff\n",
        "# END geomirror acme/00ff\n# BEGIN geomirror acme/00ff\n",
        "# BEGIN geomirror acme/00ff\n" * 2 + "# END geomirror acme/00ff\n",
    ],
)
def test_damaged_marks_are_left_to_the_operator(text):
    with pytest.raises(RefusedError, match="not a pair"):
        with_block(text.encode(), OWN, LINES)


def test_a_file_keeps_mode_owner_and_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "hosts"
    real.write_bytes(OLD)
    real.chmod(0o644)
    link.symlink_to(real)
    before = real.stat()
    assert update_hosts(link, OWN, LINES)
    assert not update_hosts(link, OWN, LINES)
    after = real.stat()
    assert link.is_symlink()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert after.st_ino != before.st_ino  # replaced, not written over
    assert update_hosts(link, OWN, [])
    assert real.read_bytes() == OLD
    assert sorted(os.listdir(tmp_path)) == ["hosts", "real"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert not update_hosts(tmp_path / "hosts", OWN, [])
    with pytest.raises(StorageError):
        update_hosts(tmp_path / "hosts", OWN, LINES)
    with pytest.raises(StorageError):
        update_hosts(tmp_path / "nowhere" / "hosts", OWN, LINES)


def test_a_left_over_of_a_crash_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(OLD)
    (tmp_path / ".hosts.geomirror").write_bytes(b"half")
    assert update_hosts(path, OWN, LINES)
    assert os.listdir(tmp_path) == ["hosts"]


def test_several_nodes_of_a_machine_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(OLD)
    names = [f"acme/{number}" for number in range(8)]
    threads = [threading.Thread(target=update_hosts, args=(path, n, LINES)) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = path.read_text()
    assert all(text.count(f"# BEGIN geomirror {name}\n") == 1 for name in names)
    assert text.startswith(OLD.decode())
