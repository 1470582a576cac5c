"""Two real daemons in two network namespaces, over a link that treats packets as a bad WAN does."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest

from geomirror.lab.namespace_io import Namespace
from geomirror.lab.packet_emulator_io import PacketEmulator
from tests.lab.packet_support import need_packet_emulator
from tests.system.support import MIB, Site, count_links, create, until, wait_applied

pytestmark = [pytest.mark.system, pytest.mark.timeout(110)]

SIZE = 16 * MIB
LINK = "rtt=80ms,jitter=5ms,rate=100mbit,queue=512KiB,loss=1%,reorder=1%/10ms"
FLAP_S = 8.0


class FarSite(Site):
    """A node whose network is a namespace. Its sockets in the file system are everybody's."""

    def __init__(self, root: Path, name: str, namespace: Namespace) -> None:
        super().__init__(root, name)
        self.namespace = namespace
        self.endpoint = f"{namespace.ipv4}:{self.port}"

    def command(self, *arguments: str) -> list[str]:
        return self.namespace.command(*super().command(*arguments))


def is_listening(seen_from: Namespace, site: FarSite) -> bool:
    """Whether a connection from a namespace is accepted."""
    with seen_from.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((str(site.namespace.ipv4), site.port)) == 0


def make_far_network(a: FarSite, b: FarSite) -> None:
    a.run(
        *("network", "create", "acme", "--site", "east", "--node", "east-1"),
        *("--listen", a.endpoint),
    )
    a.restart()
    until(lambda: is_listening(b.namespace, a), what=f"east-1 listens:\n{a.log()}")
    token = a.run("token", "create", "--site", "west", "--node", "west-1").strip()
    b.run("join", token, "--listen", b.endpoint)
    b.start()
    for site in (a, b):
        until(lambda site=site: count_links(site) == 1, what=f"link of {site.name}")


def compressible(size: int) -> bytes:
    """Different in every block, and a quarter of it on the wire: TCP without BBR is slow here."""
    chance = random.Random(1)
    return b"".join(chance.randbytes(1024) * 4 for _ in range(size // 4096))


async def test_a_mirror_survives_loss_reordering_and_a_flap(tmp_path: Path) -> None:
    need_packet_emulator()
    data = compressible(SIZE)
    async with PacketEmulator(["a", "b"], {("a", "b"): LINK}) as wan:
        a, b = (FarSite(tmp_path, name, wan.node(name)) for name in "ab")
        try:
            await asyncio.to_thread(mirror, wan, a, b, data, asyncio.get_running_loop())
        finally:
            a.end()
            b.end()
        seen = await wan.link("a", "b").statistics("a")
        assert seen["lost"] and seen["reordered"] and seen["down_drops"]
        assert wan.log() == ""


def mirror(
    wan: PacketEmulator, a: FarSite, b: FarSite, data: bytes, loop: asyncio.AbstractEventLoop
) -> None:
    make_far_network(a, b)
    create(a, "pg")
    asyncio.run(a.write(0, data))
    # Down as soon as the first of it is on its way, in the midst of the stream.
    flap = asyncio.run_coroutine_threadsafe(wan.link("a", "b").flap(FLAP_S), loop)
    flap.result(10)
    down_at = time.monotonic()
    changed = os.urandom(64 * 1024)
    asyncio.run(a.write(5 * MIB + 123, changed))
    assert time.monotonic() - down_at < FLAP_S  # a writer does not wait for the link
    wait_applied(a, timeout_s=60)
    assert time.monotonic() - down_at > FLAP_S - 1  # but the mirror had to
    expected = bytearray(data)
    expected[5 * MIB + 123 : 5 * MIB + 123 + len(changed)] = changed
    assert asyncio.run(b.read(0, SIZE)) == expected
    assert asyncio.run(a.read(0, SIZE)) == expected
    assert a.crashes() == b.crashes() == []
    for site in (a, b):
        assert site.stop() == 0
