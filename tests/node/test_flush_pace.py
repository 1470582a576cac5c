"""Small syncs of a fast disk are done at once; everything else by threads; flushes share one."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from geomirror.environment import MS, US, SystemClock, SystemEntropy
from geomirror.errors import GeomirrorError, StorageError
from geomirror.limits import PRODUCTION
from geomirror.nbd.constants import CMD_FLUSH, CMD_WRITE
from geomirror.nbd.protocol import Request
from geomirror.node.context import NodeContext
from geomirror.node.job_pace import SyncPace
from geomirror.node.primary_export import HeldWriters, PrimaryExport
from geomirror.node.replica_runner import ReplicaRunner
from geomirror.node.status_contexts import StatusContexts
from geomirror.volume.engine import Engine, VolumeSpec
from geomirror.volume.journal_jobs import SyncJob
from geomirror.volume.store_io import DirectoryStore
from geomirror.volume.superblock import GenerationRecord
from geomirror.wan_protocol.primary import Primary


class FakeClock:
    """Moves when a job says so."""

    def __init__(self) -> None:
        self.ns = 1

    def now_ns(self) -> int:
        return self.ns

    def wall_ns(self) -> int:
        return self.ns


class Takes:
    """A job of a given length."""

    def __init__(self, clock: FakeClock, ns: int, error: GeomirrorError | None = None) -> None:
        self._clock, self._ns, self._error = clock, ns, error

    def run(self) -> None:
        self._clock.ns += self._ns
        if self._error is not None:
            raise self._error


def test_a_disk_is_fast_once_it_was_seen_to_be():
    clock = FakeClock()
    pace = SyncPace(clock)
    assert not pace.is_fast
    pace.run(Takes(clock, 180 * US))
    assert pace.is_fast
    # One stall sends the next ones to threads; after some fast ones there it is trusted again.
    pace.run(Takes(clock, 50 * MS))
    assert not pace.is_fast
    count = 0
    while not pace.is_fast:
        pace.run(Takes(clock, 180 * US))
        count += 1
    assert 1 <= count <= 4


def test_a_disk_that_stalls_often_is_not_fast():
    clock = FakeClock()
    pace = SyncPace(clock)
    fast = 0
    for number in range(400):
        pace.run(Takes(clock, 50 * MS if number % 4 == 0 else 180 * US))
        fast += pace.is_fast
    assert fast < 100


def test_a_slow_disk_is_never_fast():
    clock = FakeClock()
    pace = SyncPace(clock)
    for _ in range(20):
        pace.run(Takes(clock, 2 * MS))
        assert not pace.is_fast
    error = StorageError("fdatasync x: EIO")
    assert pace.run(Takes(clock, 2 * MS, error)) is error


class Sink:
    """Notes what is answered."""

    is_closed = False

    def __init__(self) -> None:
        self.done: list[int] = []

    def reply_many(self, cookies: list[int]) -> None:
        self.done += cookies

    def reply(self, cookie: int, error: int = 0, message: str = "") -> None:
        raise AssertionError(f"request {cookie}: {error} {message}")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = Engine.create(
        DirectoryStore(tmp_path),
        PRODUCTION,
        SystemEntropy(),
        name="pg",
        resource_id=bytes(16),
        volumes=[VolumeSpec(0, "data", 1 << 20)],
        journal_bytes=PRODUCTION.journal_bytes_min,
        role="primary",
        chain=[GenerationRecord(bytes(16).hex(), token=1, reason="created")],
        wall_ns=0,
    )
    yield found
    found.close()


def make(engine: Engine, executor: ThreadPoolExecutor) -> tuple[PrimaryExport, Primary]:
    clock = SystemClock()
    context = cast(Any, NodeContext)(
        name="a",
        site="a",
        data_dir=Path("/"),
        limits=PRODUCTION,
        clock=clock,
        entropy=SystemEntropy(),
        links=None,
        emit=lambda *_: None,
        executor=executor,
    )
    core = Primary(
        engine,
        PRODUCTION,
        incarnation=bytes(16),
        peers=[],
        now_ns=clock.now_ns(),
        wall_ns=clock.wall_ns(),
    )
    held = HeldWriters()
    runner = ReplicaRunner(
        core,
        "pg",
        context,
        on_room=held.retry,
        on_flush=lambda token, error: cast(Any, token).answer(error),
        on_progress=lambda: None,
    )
    contexts = StatusContexts(runner, core)
    return PrimaryExport("pg/data", 0, runner, held, contexts), core


async def test_flushes_of_one_turn_share_a_sync(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    with ThreadPoolExecutor(1) as executor:
        export, core = make(engine, executor)
        syncs: list[int] = []
        begin = engine.journal.begin_sync

        def counted() -> object:
            job = begin()
            syncs.append(job.lsn)
            return job

        monkeypatch.setattr(engine.journal, "begin_sync", counted)
        clients = [Sink() for _ in range(8)]
        handles = [export.open(cast(Any, sink)) for sink in clients]
        for number, (sink, handle) in enumerate(zip(clients, handles, strict=True)):
            write = Request(CMD_WRITE, 0, 1, number * 4096, 4096, memoryview(bytes(4096)))
            export.submit(handle, [write], cast(Any, sink))
            export.submit(handle, [Request(CMD_FLUSH, 0, 2, 0, 0, None)], cast(Any, sink))
            assert sink.done == [1]
        while any(sink.done != [1, 2] for sink in clients):
            await asyncio.sleep(0.001)
        assert len(syncs) == 1
        assert engine.journal.durable_lsn == engine.journal.end_lsn
        await export.runner.stop()
        assert core.fenced is None


async def test_a_flush_waits_for_what_was_completed_before_it(engine: Engine):
    with ThreadPoolExecutor(1) as executor:
        export, _ = make(engine, executor)
        sink = Sink()
        handle = export.open(cast(Any, sink))
        for number in range(50):
            write = Request(CMD_WRITE, 0, number, number * 4096, 4096, memoryview(bytes(4096)))
            export.submit(handle, [write], cast(Any, sink))
            end_lsn = engine.journal.end_lsn
            export.submit(
                handle, [Request(CMD_FLUSH, 0, 1000 + number, 0, 0, None)], cast(Any, sink)
            )
            while 1000 + number not in sink.done:
                assert engine.journal.durable_lsn < end_lsn
                await asyncio.sleep(0)
            assert engine.journal.durable_lsn >= end_lsn
        await export.runner.stop()


async def test_a_flush_waits_for_no_other_job(engine: Engine):
    with ThreadPoolExecutor(1) as executor:
        export, _ = make(engine, executor)
        sink = Sink()
        handle = export.open(cast(Any, sink))
        gate = threading.Event()
        executor.submit(gate.wait)  # A pass that takes long has the only worker thread.
        try:
            write = Request(CMD_WRITE, 0, 1, 0, 4096, memoryview(bytes(4096)))
            export.submit(handle, [write], cast(Any, sink))
            export.submit(handle, [Request(CMD_FLUSH, 0, 2, 0, 0, None)], cast(Any, sink))
            async with asyncio.timeout(10):
                while sink.done != [1, 2]:
                    await asyncio.sleep(0.001)
        finally:
            gate.set()
        await export.runner.stop()
        assert not [one for one in threading.enumerate() if one.name == "geomirror-sync-pg"]


async def test_a_bug_in_a_sync_fences_and_is_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda found: told.append(found.exc_value))
    with ThreadPoolExecutor(1) as executor:
        export, core = make(engine, executor)
        answers: list[tuple[int, int]] = []
        sink = Sink()
        monkeypatch.setattr(sink, "reply", lambda cookie, error, _: answers.append((cookie, error)))
        handle = export.open(cast(Any, sink))
        write = Request(CMD_WRITE, 0, 1, 0, 4096, memoryview(bytes(4096)))
        export.submit(handle, [write], cast(Any, sink))
        bug = ZeroDivisionError("a bug")

        def fail(_: object) -> None:
            raise bug

        monkeypatch.setattr(SyncJob, "run", fail)
        export.submit(handle, [Request(CMD_FLUSH, 0, 2, 0, 0, None)], cast(Any, sink))
        async with asyncio.timeout(10):
            while not answers:
                await asyncio.sleep(0.001)
        assert answers == [(2, errno.ESHUTDOWN)]
        assert core.fenced is not None
        assert "internal error in sync: ZeroDivisionError" in str(core.fenced)
        await export.runner.stop()
        assert told == [bug]
