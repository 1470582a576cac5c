"""Views end after their time, whatever the clock is set to meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from geomirror.environment import SECOND
from geomirror.limits import PRODUCTION
from geomirror.node.view_host import ViewHost, ViewRecord
from geomirror.volume.store_io import DirectoryStore
from tests.volume.rollback_rig import RollbackRig

START_NS = 1_700_000_000 * SECOND
HOUR = 3600 * SECOND


@dataclass
class TwoClocks:
    """Wall and monotonic, each moved by hand."""

    wall: int = START_NS
    monotonic: int = 5

    def wall_ns(self) -> int:
        return self.wall

    def now_ns(self) -> int:
        return self.monotonic

    def pass_time(self, ns: int) -> None:
        self.wall += ns
        self.monotonic += ns


@dataclass
class Node:
    clock: TwoClocks
    executor: ThreadPoolExecutor
    name: str = "west-1"
    limits: Any = PRODUCTION


@pytest.fixture
def clock() -> TwoClocks:
    return TwoClocks()


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as found:
        yield found


class Life:
    """One start of the node after the other, over one directory."""

    def __init__(self, path: Path, clock: TwoClocks, executor: ThreadPoolExecutor) -> None:
        self.rig = RollbackRig(9950)
        self.rig.history(4)
        self.store = DirectoryStore(path)
        self.node = Node(clock, executor)
        self.host: ViewHost
        self.restart()

    def restart(self) -> None:
        self.host = ViewHost("pg", self.rig.engine, self.store, self.node)  # type: ignore[arg-type]
        self.host.open_all()

    def add(self, name: str, lifetime_s: float | None) -> None:
        """As `create` leaves it on the disk."""
        now_ns = self.node.clock.wall_ns()
        ends_ns = None if lifetime_s is None else now_ns + int(lifetime_s * SECOND)
        record = ViewRecord(
            name=name,
            generation="ff" * 16,
            epoch=1,
            wall_ns=now_ns,
            created_wall_ns=now_ns,
            expires_wall_ns=ends_ns,
            is_writable=False,
            quota_bytes=0,
            sizes={},
        )
        file = self.store.create(f"views/{name}.view", 0)
        file.pwritev([msgspec.json.encode(record)], 0)
        file.close()
        self.restart()

    def names(self) -> list[str]:
        return [each["name"] for each in self.host.describe_all()]


@pytest.fixture
def life(tmp_path: Path, clock: TwoClocks, executor: ThreadPoolExecutor) -> Life:
    return Life(tmp_path, clock, executor)


async def test_a_clock_that_is_set_neither_ends_a_view_nor_keeps_it(
    life: Life, clock: TwoClocks
) -> None:
    life.add("hour", 3600)
    life.add("ever", None)
    clock.wall += 24 * HOUR
    assert await life.host.expire() == []
    clock.wall -= 48 * HOUR
    clock.pass_time(HOUR - 1)
    assert await life.host.expire() == []
    clock.pass_time(2)
    assert await life.host.expire() == ["hour"]
    assert life.names() == ["ever"]


async def test_expiry_goes_on_over_restarts(life: Life, clock: TwoClocks) -> None:
    life.add("hour", 3600)
    clock.pass_time(HOUR // 2)
    life.restart()
    assert await life.host.expire() == []
    clock.pass_time(HOUR // 2)
    clock.monotonic = 7  # The machine was started anew, too.
    life.restart()
    assert await life.host.expire() == ["hour"]
    life.restart()
    assert life.names() == []


async def test_a_clock_set_back_while_the_node_was_away_gives_no_view_a_longer_life(
    life: Life, clock: TwoClocks
) -> None:
    life.add("hour", 3600)
    clock.wall -= 1000 * HOUR
    life.restart()
    clock.pass_time(HOUR - 1)
    assert await life.host.expire() == []
    clock.pass_time(1)
    assert await life.host.expire() == ["hour"]
