"""Real packets through the packet-level emulator: everything that it can do to them.

One pair of namespaces for the whole file; each test sets the links that it wants. Once more as a
program that watches its own memory.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from geomirror.errors import NotFoundError, UnreachableError, UsageError
from geomirror.lab.compile_io import FLAGS, compile_program
from geomirror.lab.namespace_io import NETNS_DIRECTORY, remove_leftovers
from geomirror.lab.packet_emulator_io import SOURCE, PacketEmulator, PacketLink
from geomirror.lab.packet_scenario import PacketSettings
from tests.lab.packet_support import Transfer, need_packet_emulator, ping, send_numbers

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

SANITIZED = (*FLAGS, "-Werror", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(autouse=True)
def able() -> None:
    need_packet_emulator()


def names(owner: str) -> list[str]:
    return [name for name in os.listdir(NETNS_DIRECTORY) if name.startswith(owner)]


@asynccontextmanager
async def network(
    settings: str = "", *, nodes: tuple[str, ...] = ("a", "b"), **options: Any
) -> AsyncIterator[PacketEmulator]:
    """A network that leaves nothing behind and has nothing to complain of."""
    links = {("a", "b"): settings} if settings else {}
    async with PacketEmulator(nodes, links, **options) as made:
        yield made
        assert made.log() == ""
        assert made.pid is not None
    assert made.pid is None
    assert names(made.owner) == []
    assert not made.directory.exists()


async def test_a_round_trip_takes_the_delay_of_both_directions() -> None:
    async with network("rtt=80ms", nodes=("a", "b", "c")) as made:
        a, b, c = (made.node(name) for name in "abc")
        pings = await asyncio.to_thread(ping, a, b, 20)
        assert pings.order == list(range(20))
        # The best ones say what the emulator does; the others what the machine does besides.
        assert 0.080 <= min(pings.rtt_s) <= 0.095
        assert sorted(pings.rtt_s)[10] <= 0.120
        await made.link("a", "b").set("delay=10ms", source="a")
        pings = await asyncio.to_thread(ping, a, b, 10)
        assert 0.050 <= min(pings.rtt_s) <= 0.065
        # The other links were not named.
        assert min((await asyncio.to_thread(ping, c, a, 10)).rtt_s) <= 0.015
        await made.link("a", "b").set("delay=40ms,jitter=20ms")
        pings = await asyncio.to_thread(ping, a, b, 100)
        assert pings.order == list(range(100))  # jitter keeps the order
        assert min(pings.rtt_s) >= 0.040
        assert max(pings.rtt_s) - min(pings.rtt_s) > 0.010


async def test_packets_are_lost_at_the_rate_that_was_set() -> None:
    async with network("delay=1ms,loss=10%") as made:
        a, b = made.node("a"), made.node("b")
        found = await asyncio.to_thread(send_numbers, a, b, 5000)
        seen = await made.link("a", "b").statistics("a")
        # Five standard deviations; and the receiver's buffer lost nothing.
        assert 5000 * 0.1 - 106 <= seen["lost"] <= 5000 * 0.1 + 106
        assert len(found) == 5000 - seen["lost"]
        assert found == sorted(found)
        assert (await made.link("a", "b").statistics("b"))["lost"] == 0


async def test_burst_loss_comes_in_bursts() -> None:
    async with network("burst=10%/20") as made:
        found = await asyncio.to_thread(send_numbers, made.node("a"), made.node("b"), 10_000)
        lost = sorted(set(range(10_000)) - set(found))
        bursts = 1 + sum(b - a > 1 for a, b in itertools.pairwise(lost))
        assert 400 <= len(lost) <= 1800  # about 50 bursts: far less certain than single losses
        assert 12 <= len(lost) / bursts <= 32


async def test_the_same_seed_loses_the_same_packets() -> None:
    found = []
    for seed in (5, 5, 6):
        async with network("loss=30%", seed=seed) as made:
            fate = await asyncio.to_thread(send_numbers, made.node("a"), made.node("b"), 300)
            found.append(fate)
    assert found[0] == found[1] != found[2]


async def test_some_packets_are_overtaken_and_some_come_twice() -> None:
    async with network("delay=5ms,reorder=5%/20ms") as made:
        a, b = made.node("a"), made.node("b")
        found = await asyncio.to_thread(send_numbers, a, b, 2000)
        assert sorted(found) == list(range(2000))
        seen = await made.link("a", "b").statistics("a")
        assert 50 <= seen["reordered"] <= 150
        late = sum(number < highest for number, highest in running_highest(found))
        assert 0.5 * seen["reordered"] <= late <= seen["reordered"]
        await made.link("a", "b").set("reorder=0%,duplicate=10%")
        found = await asyncio.to_thread(send_numbers, a, b, 2000)
        doubled = (await made.link("a", "b").statistics("a"))["duplicated"]
        assert 130 <= doubled <= 270
        assert set(found) == set(range(2000))
        assert len(found) == 2000 + doubled


def running_highest(numbers: list[int]) -> list[tuple[int, int]]:
    """Each number with the highest that came before it."""
    highest, pairs = -1, []
    for number in numbers:
        pairs.append((number, highest))
        highest = max(highest, number)
    return pairs


async def test_large_packets_vanish_in_an_mtu_hole_while_small_ones_pass() -> None:
    async with network("mtu=1300") as made:
        a, b = made.node("a"), made.node("b")
        echo = functools.partial(ping, a, b, 3, wait_s=0.3, is_unfragmented=True)
        assert (await asyncio.to_thread(echo, payload_bytes=1300 - 28)).received == 3
        assert (await asyncio.to_thread(echo, payload_bytes=1302 - 28)).received == 0
        assert (await made.link("a", "b").statistics("a"))["oversized"] == 3
        # TCP: the handshake passes, full segments do not, and nobody says so.
        transfer = await asyncio.to_thread(Transfer, a, b)
        try:
            transfer.sender.sendall(bytes(20_000))
            await asyncio.sleep(0.5)
            assert len(transfer.received) == 0
            await made.link("a", "b").set("mtu=0")
            arrived = await asyncio.to_thread(transfer.finish)
            assert len(arrived) == 20_000
        finally:
            transfer.close()


async def test_the_rate_is_kept_within_a_tenth() -> None:
    async with network("rtt=10ms,rate=40mbit,queue=256KiB") as made:
        transfer = await asyncio.to_thread(Transfer, made.node("a"), made.node("b"))
        link = made.link("a", "b")
        try:
            sending = asyncio.create_task(asyncio.to_thread(transfer.send_for, 8))
            await asyncio.sleep(0.5)
            rates = []
            # A machine that did something else for a while may try again; too much is too much.
            while len(rates) < 3 and not (rates and rates[-1] >= 36e6):
                rates.append(await rate(link, 2.0))
                assert rates[-1] <= 44e6
            assert max(rates) >= 36e6, rates
            transfer.stop()
            await sending
        finally:
            transfer.close()
        seen = await link.statistics("a")
        # Drop-tail: it fills up to its bound, and not beyond.
        assert 64_000 <= seen["queue_bytes_peak"] <= 256 * 1024


async def test_what_waits_keeps_its_size_when_the_rate_changes() -> None:
    async with network("rate=20kbit,queue=64KiB") as made:
        link = made.link("a", "b")
        with made.node("a").socket(socket.SOCK_DGRAM) as sender:
            target = (str(made.node("b").ipv4), 9)
            for _ in range(100):  # 3.2 KB of packets: more than a second of this line
                sender.sendto(b"data", target)
            await until_packets(link, 100)
            # At the new rate that second would be twelve megabytes.
            await link.set("rate=100mbit")
            for _ in range(50):
                sender.sendto(b"data", target)
            await until_packets(link, 150)
        seen = await link.statistics("a")
        assert seen["queue_drops"] == 0
        assert seen["queue_bytes_peak"] <= 150 * 32


async def until_packets(link: PacketLink, count: int) -> None:
    """Until the emulator has taken so many out of node a."""
    async with asyncio.timeout(10):
        while (await link.statistics("a"))["packets_in"] < count:
            await asyncio.sleep(0.02)


async def rate(link: PacketLink, seconds: float) -> float:
    """Bits a second out of node a, for a time."""
    begin, before = time.monotonic(), (await link.statistics("a"))["bytes_out"]
    await asyncio.sleep(seconds)
    after = (await link.statistics("a"))["bytes_out"]
    return float(after - before) * 8 / (time.monotonic() - begin)


async def test_down_loses_packets_and_stall_keeps_them() -> None:
    async with network("rtt=10ms", nodes=("a", "b", "c")) as made:
        a, b, c = (made.node(name) for name in "abc")
        link = made.link("a", "b")
        echo = functools.partial(asyncio.to_thread, ping, a, b)
        await link.down()
        assert (await link.statistics("a"))["state"] == "down"
        assert (await echo(3, wait_s=0.2)).received == 0
        assert (await asyncio.to_thread(ping, a, c, 3)).received == 3
        await link.up()
        assert (await echo(3)).received == 3
        await link.down(source="b")  # only the answers
        assert (await echo(3, wait_s=0.2)).received == 0
        assert (await link.statistics("a"))["state"] == "up"
        await link.up()
        await link.stall()
        waiting = asyncio.create_task(echo(5, wait_s=10))
        await asyncio.sleep(0.3)
        assert (await link.statistics("a"))["state"] == "stalled"
        assert not waiting.done()
        await link.up()
        pings = await waiting
        assert pings.order == [0, 1, 2, 3, 4]
        assert min(pings.rtt_s) >= 0.15
        begin = time.monotonic()
        await link.flap(0.4)
        assert (await echo(1, wait_s=0.1)).received == 0
        while (await link.statistics("a"))["state"] != "up":
            await asyncio.sleep(0.02)
        assert time.monotonic() - begin >= 0.4
        assert (await echo(3)).received == 3


@pytest.mark.parametrize("is_offloading", [True, False])
async def test_tcp_brings_every_byte_over_a_bad_link(is_offloading: bool) -> None:
    settings = "rtt=10ms,jitter=2ms,rate=200mbit,loss=0.5%,reorder=1%/3ms,duplicate=1%"
    async with network(settings, is_offloading=is_offloading) as made:
        await carry(made, 2 << 20)


async def carry(made: PacketEmulator, size: int) -> None:
    """Random bytes over TCP must come out as they went in."""
    data = random.Random(size).randbytes(size)
    transfer = await asyncio.to_thread(Transfer, made.node("a"), made.node("b"))
    try:
        await asyncio.to_thread(transfer.sender.sendall, data)
        assert await asyncio.to_thread(transfer.finish) == data
    finally:
        transfer.close()


async def test_corruption_passes_the_checksums_of_tcp() -> None:
    async with network("rtt=2ms,corrupt=1%") as made:
        data = random.Random(1).randbytes(2 << 20)
        transfer = await asyncio.to_thread(Transfer, made.node("a"), made.node("b"))
        try:
            await asyncio.to_thread(transfer.sender.sendall, data)
            arrived = await asyncio.to_thread(transfer.finish)
        finally:
            transfer.close()
        flipped = (await made.link("a", "b").statistics("a"))["corrupted"]
        assert len(arrived) == len(data)
        wrong = sum(x != y for x, y in zip(arrived, data, strict=True))
        assert 1 <= wrong <= flipped


async def test_a_program_that_watches_its_memory_finds_nothing_wrong(tmp_path: Path) -> None:
    program = await compile_program(SOURCE, flags=SANITIZED, cache=tmp_path / "cache")
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    settings = "rtt=4ms,jitter=1ms,rate=100mbit,loss=1%,reorder=1%/3ms,duplicate=5%,burst=1%/3"
    options = {"program": program, "environment": environment}
    async with network(settings, **options) as made:
        await carry(made, 1 << 20)
        a, b = made.node("a"), made.node("b")
        await made.link("a", "b").set("corrupt=20%,loss=0%,burst=0%")
        await asyncio.to_thread(send_numbers, a, b, 500)
        await asyncio.to_thread(ping, a, b, 20, payload_bytes=8000)
        link = made.link("a", "b")
        await link.stall()
        await asyncio.to_thread(send_numbers, a, b, 200, wait_s=0.1)
        await link.down("a")
        await link.up()
        await asyncio.to_thread(send_numbers, a, b, 200, wait_s=0.1)
        for line in ("", "set", "set 0", "set 0 9 loss=1", "set 0 1 loss", "x " * 40, "up 0 0"):
            with pytest.raises(UsageError):
                await made.call([line])
        with pytest.raises(UnreachableError):
            await made.call(["x" * 2000])
        await asyncio.sleep(0.1)
        found = await made.statistics()
        assert found["packets_under_way"] == found["packets_held"] == found["bytes_held"] == 0


async def test_mistakes_are_named_before_anything_is_made() -> None:
    for nodes in (["a"], ["a", "a"], [f"n{i}" for i in range(17)], ["a", "../b"], ["a", ""]):
        with pytest.raises(UsageError):
            PacketEmulator(nodes)
    with pytest.raises(NotFoundError):
        PacketEmulator(["a", "b"], {("a", "c"): "rtt=1ms"})
    with pytest.raises(UsageError):
        PacketEmulator(["a", "b"], {("a", "b"): "loss=200%"})
    made = PacketEmulator(["a", "b-1"])
    with pytest.raises(NotFoundError):
        made.node("c")
    with pytest.raises(NotFoundError):
        await made.link("a", "b-1").down(source="c")
    await made.close()  # nothing was started


async def test_bad_settings_at_run_time_change_nothing() -> None:
    async with network("rtt=10ms") as made:
        link = made.link("a", "b")
        with pytest.raises(UsageError):
            await link.set("rtt=20ms,loss=200%")
        with pytest.raises(UsageError):
            await made.call(["set 0 1 delay=5 loss=2"])
        assert link.settings["a"] == PacketSettings(delay_ns=5_000_000)
        pings = await asyncio.to_thread(ping, made.node("a"), made.node("b"), 5)
        assert min(pings.rtt_s) >= 0.010


CRASHING = """
import asyncio, os, sys
from geomirror.lab.packet_emulator_io import PacketEmulator
async def main():
    made = PacketEmulator(["a", "b"])
    await made.start()
    print(made.owner, made.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_what_a_crash_leaves_is_removed_and_nothing_else() -> None:
    async with network() as other:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CRASHING, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        owner, pid = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().split()
        assert len(names(owner)) == 2
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await until(lambda: not Path(f"/proc/{pid}").exists())  # it dies with its parent
        await remove_leftovers()
        assert names(owner) == []
        assert not (other.directory.parent / owner).exists()
        assert len(names(other.owner)) == 2
        pings = await asyncio.to_thread(ping, other.node("a"), other.node("b"), 3)
        assert pings.received == 3


async def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.02)


async def test_a_killed_emulator_is_said_and_cleaned_up() -> None:
    made = PacketEmulator(["a", "b"])
    await made.start()
    try:
        assert made.pid is not None
        os.kill(made.pid, signal.SIGKILL)
        await until(lambda: made.pid is None)
        with pytest.raises(UnreachableError):
            await made.link("a", "b").down()
    finally:
        await made.close()
    assert names(made.owner) == []
