"""The judge of copies: a state that the disk had is told from a mix that it never had."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from bench.cells import ROOT
from bench.machine import missing_tools
from bench.mirror_geomirror import GeomirrorMirror
from bench.mirrors import RsyncMirror
from bench.observe import Observed, Times, observe
from bench.peers import LINK, OPEN, RATE, Row, _make_image
from bench.stamped_writer import DONE, ISSUED, open_log
from bench.stamps import (
    GROUP_BLOCKS,
    REGION_BYTES,
    Plan,
    Stamps,
    background,
    content,
    is_compressible,
)
from geomirror.environment import SECOND
from geomirror.lab.packet_emulator_io import PacketEmulator
from geomirror.limits import BLOCK_BYTES, MIB
from tests.lab.packet_support import need, need_packet_emulator

PLAN = Plan(volume_bytes=32 * MIB, regions=4, count=300, seed=7)


def stamps(plan: Plan, through: int) -> Stamps:
    state = plan.state(through)
    return Stamps(state.copy(), state.copy())


def large_write(plan: Plan) -> int:
    return next(n for n in range(2, plan.count) if plan.write(n)[1] == GROUP_BLOCKS)


def test_every_state_that_the_disk_had_is_usable() -> None:
    assert all(PLAN.is_usable(stamps(PLAN, number)) for number in range(PLAN.count + 1))


def test_a_large_write_may_be_there_in_part() -> None:
    number = large_write(PLAN)
    before, after = PLAN.state(number - 1), PLAN.state(number)
    half = before.copy()
    changed = np.flatnonzero(before != after)
    half[changed[::2]] = number
    assert PLAN.is_usable(Stamps(half, half))


def test_a_copy_without_an_older_write_is_not_usable() -> None:
    number = PLAN.count
    state = PLAN.state(number)
    older = np.flatnonzero((state > 0) & (state < number - 1))
    for block in older[:20]:
        mixed = state.copy()
        mixed[block] = 0
        assert not PLAN.is_usable(Stamps(mixed, mixed))


def test_a_torn_block_is_not_usable_nor_held() -> None:
    number = PLAN.count
    whole = stamps(PLAN, number)
    tails = whole.tails.copy()
    block = int(np.flatnonzero(whole.heads == number)[0])
    tails[block] = 0
    torn = Stamps(whole.heads, tails)
    assert not PLAN.is_usable(torn)
    end = PLAN.entries_through(number)
    newest = np.arange(end - PLAN.write(number)[1], end)
    assert PLAN.is_held(whole, newest).all()
    assert not PLAN.is_held(torn, newest).all()


def test_an_overwritten_block_is_held_and_a_missing_one_is_not() -> None:
    entries = np.arange(PLAN.entries_through(PLAN.count))
    assert PLAN.is_held(stamps(PLAN, PLAN.count), entries).all()
    assert not PLAN.is_held(stamps(PLAN, 0), entries).any()


def test_a_number_that_was_never_written_is_not_usable() -> None:
    state = PLAN.state(PLAN.count)
    state[0] = PLAN.count + 5
    assert not PLAN.is_usable(Stamps(state, state))


def test_stamps_are_read_back_from_contents() -> None:
    random = os.urandom(GROUP_BLOCKS * BLOCK_BYTES)
    for number in (1, 2):
        data = content(number, 3, random)
        found = Stamps.of(data)
        assert found.heads.tolist() == found.tails.tolist() == [number] * 3
        assert (data[1024:2040] == data[2048:3064]) is is_compressible(number)


def test_writes_stay_in_the_regions_and_overwrite() -> None:
    offsets = PLAN.region_offsets()
    for number in range(1, PLAN.count + 1):
        offset, blocks = PLAN.write(number)
        assert any(at <= offset and offset + blocks * BLOCK_BYTES <= at + REGION_BYTES
                   for at in offsets)  # fmt: skip
    numbers, blocks = PLAN.entries
    assert len(set(blocks.tolist())) < len(numbers)
    covered = {offset for offset, _ in background(PLAN.volume_bytes, PLAN, os.urandom(1 << 20))}
    assert set(offsets) <= covered


def test_delays_latencies_and_shares_follow_from_a_log(tmp_path: Path) -> None:
    plan = Plan(32 * MIB, 4, 3, seed=1)
    log = open_log(tmp_path / "log", plan.count, is_new=True)
    for number, (issued, done) in enumerate([(1, 2), (3, 4), (12, 30)], 1):
        log[number, ISSUED], log[number, DONE] = issued * SECOND, done * SECOND
    seen = Observed(plan, log, down_ns=10 * SECOND, up_ns=20 * SECOND, end_ns=40 * SECOND)
    seen.held_ns = np.zeros(len(plan.entries[0]), dtype=np.int64)
    seen.held_ns[: plan.entries_through(1)] = 5 * SECOND
    seen.looks = [(1 * SECOND, True, 0.0), (2 * SECOND, False, 0.0), (15 * SECOND, True, 1.0)]
    assert seen.writes == 3
    assert sorted(set(seen.delays_s(is_steady=True))) == [3.0, 36.0]
    assert max(seen.delays_s(is_steady=False)) == 36.0
    assert seen.latencies_us(is_steady=True).tolist() == [10**6, 10**6]
    assert seen.latencies_us(is_steady=False).tolist() == [18 * 10**6]
    assert seen.usable(0, seen.down_ns) == 0.5
    assert seen.usable(seen.down_ns, seen.up_ns) == 1.0
    assert seen.lost_writes() == plan.entries_through(3) - plan.entries_through(1)


def test_a_writer_that_never_came_to_write_is_reduced_too(tmp_path: Path) -> None:
    plan = Plan(32 * MIB, 4, 3, seed=1)
    log = open_log(tmp_path / "log", plan.count, is_new=True)
    seen = Observed(plan, log, down_ns=10 * SECOND, up_ns=20 * SECOND, end_ns=40 * SECOND)
    seen.held_ns = np.zeros(len(plan.entries[0]), dtype=np.int64)
    seen.wire_bytes = {"up": 5, "end": 7}
    row = Row.of(seen, has_copy=True)
    assert math.isnan(row.write_p99_us) and math.isnan(row.held_p50_s)


@pytest.mark.system
@pytest.mark.parametrize("kind", [GeomirrorMirror, RsyncMirror])
async def test_a_mirror_is_watched_through_an_outage(kind, tmp_path: Path, monkeypatch) -> None:
    need_packet_emulator()
    if missing := missing_tools("nbdkit", "nbdcopy", "rsync"):
        need(f"not installed: {', '.join(missing)}")
    monkeypatch.chdir(ROOT)
    times = Times(steady=1.5, cut=1.0, after=1.5, catch_up_max=20)
    plan = Plan(16 * MIB, 4, int(times.writing * RATE), seed=3)
    image = tmp_path / "image"
    _make_image(image, plan)
    async with PacketEmulator(["a", "b"], {("a", "b"): OPEN}) as wan:
        mirror = kind(tmp_path / "mirror", wan, plan)
        try:
            await mirror.prepare(image)
            await wan.link("a", "b").set(LINK)
            seen = await observe(mirror, wan, times, RATE, tmp_path / "log")
        finally:
            await mirror.close()
    row = Row.of(seen, has_copy=True)
    assert seen.is_identical
    assert seen.lost_writes() == 0
    assert 0.04 < row.held_p50_s < row.held_worst_s
    assert row.resume_s > 0.04
    assert row.wire_ratio > 0.05
    if kind is GeomirrorMirror:
        assert row.usable == row.usable_in_cut == row.usable_after == 1.0
    else:
        assert mirror.passes > 1
