"""A mounted volume that grows under its file system, and the attachment that sees the new size."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.system.private_mounts import MountSite, require_attach
from tests.system.support import MIB, create, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]


def size_of(site: MountSite, device: str) -> int:
    return int(site.inside("blockdev", "--getsize64", device))


def test_a_mounted_volume_grows_and_the_next_attachment_has_the_room(tmp_path: Path) -> None:
    require_attach()
    site = MountSite(tmp_path, "a")
    data = random.Random(1).randbytes(MIB)
    try:
        site.run(
            *("network", "create", "acme", "--site", "east", "--node", "east-1"),
            *("--listen", f"127.0.0.1:{site.port}"),
        )
        site.restart()
        create(site, "pg", size="64M", secondary=None)
        device = site.run("attach", "pg", "--device").strip()
        site.inside("mkfs.ext4", "-q", device)
        site.run("detach", "pg")
        path = tmp_path / "m"
        path.mkdir()
        site.run("attach", "pg", str(path))
        (site.seen(path) / "before").write_bytes(data)
        site.run("volume", "resize", "pg/0", "--size", "128M")

        # Another size is no other disk: the attachment outlives the daemon as ever.
        site.kill()
        site.restart()
        until(lambda: site.attached()[0]["state"] == "attached", what="the daemon to be back")
        (site.seen(path) / "after").write_bytes(data)
        (found,) = site.attached()
        assert (found["errors"], size_of(site, found["device"])) == (0, 64 * MIB)
        assert site.json("detach", "pg")["is_clean"] is True

        device = site.run("attach", "pg", "--device").strip()
        assert size_of(site, device) == 128 * MIB
        site.inside("e2fsck", "-f", "-p", device)
        site.inside("resize2fs", device)
        site.run("detach", "pg")
        site.run("attach", "pg", str(path))
        assert (site.seen(path) / "before").read_bytes() == data
        assert (site.seen(path) / "after").read_bytes() == data
        text = site.inside("df", "--output=size", "-B1", str(path))
        assert int(text.split()[-1]) > 100 * MIB
        site.run("detach", "pg")
        assert site.leftovers() == site.crashes() == []
    finally:
        site.end()
