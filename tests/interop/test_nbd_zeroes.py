"""What was discarded or zeroed by real clients reads as zeros: here, at the copy, and after kills.

And `base:allocation` never calls a hole what holds something.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.limits import KIB, MIB
from tests.interop.clients import run, tool
from tests.interop.served_disks import NAME, SIZE, DaemonServed, daemons
from tests.system.support import Site, until, wait_applied

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]
RANGES = (
    (MIB, MIB),
    (3 * MIB + 100, 5000),
    (5 * MIB - 1, 2),
    (6 * MIB + 512, 300 * KIB),
    (8 * MIB, 4 * MIB),
    (SIZE - 4097, 4097),
)
"""Whole regions, parts of blocks, across a block's edge, across a region's edge, the end."""
ZERO = 2
OPERATIONS = {
    "trim": "trim(length, offset)",
    "trim and FUA": "trim(length, offset, nbd.CMD_FLAG_FUA)",
    "zero": "zero(length, offset)",
    "zero, NO_HOLE": "zero(length, offset, nbd.CMD_FLAG_NO_HOLE)",
    "zero, FAST_ZERO": "zero(length, offset, nbd.CMD_FLAG_FAST_ZERO)",
    "zero, all flags": (
        "zero(length, offset, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)"
    ),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonServed]:
    with daemons(tmp_path_factory.mktemp("zeroes")) as found:
        yield found


def expected_after(before: bytes) -> bytes:
    after = bytearray(before)
    for offset, length in RANGES:
        after[offset : offset + length] = bytes(length)
    return bytes(after)


async def nbdsh(uri: str, script: str) -> None:
    """libnbd's shell, with Debian's Python, for which Debian's bindings are."""
    await run("/usr/bin/python3", "-m", "nbd", "-u", uri, "-c", script)


async def nbd_map(uri: str) -> list[tuple[int, int, int]]:
    told = json.loads(await run("nbdinfo", "--json", "--map", uri))
    assert sum(extent["length"] for extent in told) == SIZE
    return [(extent["offset"], extent["length"], extent["type"]) for extent in told]


def check_map(found: list[tuple[int, int, int]], content: bytes) -> None:
    """What is shown as zeros is."""
    for offset, length, flags in found:
        if flags & ZERO:
            assert not any(content[offset : offset + length]), (offset, length)


def shown_as_zeros(found: list[tuple[int, int, int]], offset: int, length: int) -> int:
    """Bytes of a range that the map shows as zeros."""
    return sum(
        max(0, min(start + size, offset + length) - max(start, offset))
        for start, size, flags in found
        if flags & ZERO
    )


async def check_both(real: DaemonServed, content: bytes) -> None:
    for uri in (real.uri(), real.uri("ro")):
        check_map(await nbd_map(uri), content)
    assert await real.content() == content
    assert await real.content("ro") == content


@pytest.mark.parametrize("name", OPERATIONS)
async def test_zeros_are_zeros_here_there_and_after_a_kill(real: DaemonServed, name: str) -> None:
    tool("nbdsh")
    before = random.Random(name).randbytes(SIZE)
    after = expected_after(before)
    await real.fill(before)
    wait_applied(real.east, NAME)
    assert all(flags == 0 for _, _, flags in await nbd_map(real.uri()))
    lines = [f"for offset, length in {RANGES}:", f"    h.{OPERATIONS[name]}", "h.flush()"]
    await nbdsh(real.uri(), "\n".join(lines))
    found = await nbd_map(real.uri())
    assert await real.content() == after
    check_map(found, after)
    # At once, from the journal: every whole byte range is known to be zeros.
    assert all(shown_as_zeros(found, *each) == each[1] for each in RANGES)
    wait_applied(real.east, NAME)
    await check_both(real, after)
    restart_both(real)
    await check_both(real, after)
    # Written again over zeros, in parts.
    await nbdsh(real.uri(), f"h.pwrite(b'x' * 700, {9 * MIB + 300}); h.flush()")
    again = after[: 9 * MIB + 300] + b"x" * 700 + after[9 * MIB + 1000 :]
    wait_applied(real.east, NAME)
    await check_both(real, again)


def restart_both(real: DaemonServed) -> None:
    for site in (real.east, real.west):
        site.kill()
        site.restart()
        assert site.uri(NAME)
    until(lambda: is_streaming(real.east), what="the copy follows again")


def is_streaming(site: Site) -> bool:
    return site.peer(NAME)["state"] in ("Stream", "Fold")


async def test_what_was_discarded_is_a_hole_of_both_images(
    real: DaemonServed, tmp_path: Path
) -> None:
    """Room comes back: the files behind the volumes are sparse once the journal is applied."""
    await real.fill(random.Random(1).randbytes(SIZE))
    wait_applied(real.east, NAME)
    image = tmp_path / "image"
    image.write_bytes(await real.content())
    await run("qemu-io", "-f", "raw", "-c", f"discard 0 {SIZE}", real.uri())
    wait_applied(real.east, NAME)
    assert await nbd_map(real.uri()) == [(0, SIZE, 3)]
    assert not any(await real.content("ro"))

    def image_bytes(site: Site) -> int:
        return (site.data_dir / f"resources/{NAME}/volumes/0.img").stat().st_blocks * 512

    until(lambda: image_bytes(real.west) < SIZE // 8, what="the copy's image is punched")
    found = await nbd_map(real.uri("ro"))
    assert shown_as_zeros(found, 0, SIZE) == SIZE
    # Both come back from it.
    await run("nbdcopy", "--flush", image, real.uri())
    await real.judge_copy()
    assert await real.content() == image.read_bytes()
