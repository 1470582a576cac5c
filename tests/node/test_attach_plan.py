"""How a volume is attached on which machine, in which words; and the files that remember it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from geomirror.errors import InUseError, NotFoundError, RefusedError, UsageError
from geomirror.node import attach_plan as plan
from geomirror.node.attach_state import Attachment, AttachmentDir, attachments
from geomirror.node.paths import DataDir

TOOLS = frozenset({"nbdfuse", "nbd-client", "losetup", "mount", "umount", "blkid"})
ALL = plan.Facts(is_root=True, tools=TOOLS, has_nbd=True, has_fuse=True, has_loop=True)
NO_MODULE = replace(ALL, has_nbd=False)


def test_the_kernels_client_comes_first_and_fuse_where_it_is_not() -> None:
    assert plan.choose_method(None, ALL, mounts=True) == "nbd"
    assert plan.choose_method(None, NO_MODULE, mounts=True) == "fuse"
    assert (
        plan.choose_method(None, replace(ALL, tools=TOOLS - {"nbd-client"}), mounts=True) == "fuse"
    )
    assert plan.choose_method("fuse", ALL, mounts=True) == "fuse"
    without = replace(ALL, tools=TOOLS - {"blkid", "mount"})
    assert plan.choose_method(None, without, mounts=False) == "nbd"


@pytest.mark.parametrize(
    ("wanted", "facts", "texts"),
    [
        (None, replace(ALL, is_root=False), ["root only", "sudo", "nbd_uri"]),
        ("nbd", NO_MODULE, ["by nbd", "module is not loaded", "modprobe nbd"]),
        ("nbd", replace(ALL, tools=TOOLS - {"nbd-client"}), ["apt install nbd-client"]),
        (
            None,
            replace(NO_MODULE, tools=TOOLS - {"nbdfuse", "losetup"}),
            ["nbdfuse, losetup", "apt install libnbd-bin mount", "modprobe nbd"],
        ),
        (None, replace(NO_MODULE, has_fuse=False), ["/dev/fuse", "modprobe fuse"]),
        ("fuse", replace(ALL, has_loop=False), ["loop-control", "modprobe loop"]),
        (None, replace(ALL, tools=TOOLS - {"blkid"}), ["not installed: blkid", "util-linux"]),
    ],
)
def test_what_is_missing_is_named_with_what_helps(wanted, facts, texts) -> None:
    with pytest.raises(RefusedError) as caught:
        plan.choose_method(wanted, facts, mounts=True)
    for text in texts:
        assert text in str(caught.value)


def test_the_words_of_the_tools() -> None:
    assert plan.fuse_command("/d/fuse", 7, is_read_only=False) == [
        "nbdfuse",
        "/d/fuse",
        "--fd",
        "7",
    ]
    assert plan.fuse_command("/d/fuse", 7, is_read_only=True)[1] == "--readonly"
    assert plan.loop_command("/d/fuse/nbd", is_read_only=True) == [
        *("losetup", "--find", "--show", "--direct-io=on", "--read-only", "--", "/d/fuse/nbd"),
    ]
    assert plan.nbd_command("/s", "pg/0", "/dev/nbd3", is_read_only=True) == [
        *("nbd-client", "-unix", "/s", "/dev/nbd3", "-name", "pg/0", "-connections", "1"),
        *("-block-size", "512", "-nofork", "-nonetlink", "-readonly"),
    ]
    mount = plan.mount_command("/dev/loop1", "/m", "ext4", "noatime", is_read_only=True)
    assert mount == ["mount", "-t", "ext4", "-o", "noatime,ro", "--", "/dev/loop1", "/m"]
    plain = plan.mount_command("/dev/loop1", "/m", "xfs", "", is_read_only=False)
    assert plain == ["mount", "-t", "xfs", "--", "/dev/loop1", "/m"]


def test_the_first_free_nbd_device_is_taken() -> None:
    names = ["nbd10", "nbd2", "nbd0", "nbd1"]
    assert plan.free_nbd_device(names, frozenset({"nbd0", "nbd1"})) == "/dev/nbd2"
    assert plan.free_nbd_device(names, frozenset({"nbd0", "nbd1", "nbd2"})) == "/dev/nbd10"
    with pytest.raises(RefusedError, match="all 1 nbd devices"):
        plan.free_nbd_device(["nbd0"], frozenset({"nbd0"}))


@pytest.mark.parametrize(
    ("probed", "seen"),
    [
        ("", "never formatted"),
        ("PTUUID=1\nPTTYPE=gpt\n", r"a partition table \(gpt\)"),
        ("TYPE=LVM2_member\nUSAGE=raid\n", "an LVM physical volume"),
        ("TYPE=crypto_LUKS\nUSAGE=crypto\n", "LUKS"),
        ("TYPE=swap\nUSAGE=other\n", "swap space"),
        ("TYPE=odd\nUSAGE=other\n", r"odd \(other\)"),
    ],
)
def test_only_a_file_system_is_mounted(probed: str, seen: str) -> None:
    with pytest.raises(NotFoundError, match=seen):
        plan.file_system_of(probed, "pg/0")
    assert plan.file_system_of("DEVNAME=/dev/x\nTYPE=ext4\nUSAGE=filesystem\n", "pg/0") == "ext4"


def test_mountinfo_is_read_with_its_escapes() -> None:
    text = (
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
        "66 22 7:3 / /srv/my\\040disk rw - ext4 /dev/loop3 rw\n"
        "garbage\n"
    )
    assert plan.parse_mountinfo(text) == [
        plan.Mount("254:0", "/", "ext4", "/dev/root"),
        plan.Mount("7:3", "/srv/my disk", "ext4", "/dev/loop3"),
    ]


@pytest.mark.parametrize("text", ["", "/", "pg/", "/pg", "../x", "pg/..", "pg/0/1", "p g"])
def test_a_name_that_is_none_never_becomes_a_path(text: str) -> None:
    with pytest.raises(UsageError, match="is not a volume"):
        plan.split_volume(text)
    assert plan.split_volume("pg") == ("pg", "")
    assert plan.split_volume("my-db.2/0") == ("my-db.2", "0")


def test_an_attachment_is_remembered_locked_and_forgotten(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "d")
    files = AttachmentDir.of(data_dir, "pg", "0")
    files.create()
    assert files.path.stat().st_mode & 0o777 == 0o700
    assert (files.load(), files.is_served()) == (None, False)
    lock = files.lock()
    assert files.is_served()
    with pytest.raises(InUseError, match='"pg/0" is attached already'):
        files.lock()
    known = Attachment("pg", "0", "fuse", "/srv/pg", device="/dev/loop3")
    files.save(known)
    assert (files.path / "attachment.json").stat().st_mode & 0o777 == 0o600
    assert files.load() == known
    assert [found.path for found in attachments(data_dir)] == [files.path]
    (files.path / "attachment.json").write_text("{")
    assert files.load() is None
    files.remove()
    os.close(lock)
    assert not files.is_served()
    assert files.load() is None
