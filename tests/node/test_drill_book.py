"""What drills came to, as a node keeps it: bounded, durable, and honest about the killed ones."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from geomirror.cli.check import OK, WARNING, judge
from geomirror.environment import SECOND, SystemEntropy
from geomirror.errors import IntegrityError, NotFoundError
from geomirror.limits import PRODUCTION
from geomirror.node.context import NodeContext
from geomirror.node.drill_book import FAILED, PASSED, Drill, DrillBook

START_NS = 1_700_000_000 * SECOND


class HandClock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.ns = START_NS

    def now_ns(self) -> int:
        return self.ns

    def wall_ns(self) -> int:
        return self.ns


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def node(tmp_path: Path, clock: HandClock) -> Iterator[NodeContext]:
    (tmp_path / "resources/pg").mkdir(parents=True)
    with ThreadPoolExecutor(1) as executor:
        yield NodeContext(
            "west-1",
            "west",
            tmp_path,
            replace(PRODUCTION, drills_kept=3),
            clock,
            SystemEntropy(),
            None,  # type: ignore[arg-type]
            lambda kind, fields: None,
            executor,
        )


async def begin(book: DrillBook, resource_id: str = "id") -> Drill:
    return await book.begin("pg", resource_id, check="true", runs_on="west-1", expires_s=60)


async def end(book: DrillBook, drill: Drill, result: str) -> None:
    drill.result, drill.reason = result, "" if result == PASSED else "exit code 1"
    await book.end("pg", "id", drill)


def results(book: DrillBook) -> list[tuple[int, Any]]:
    return [(each["number"], each["result"]) for each in book.list_all("pg", "id")]


async def test_the_last_passed_one_is_known_when_it_is_not_kept_any_more(
    node: NodeContext, clock: HandClock
) -> None:
    book = DrillBook(node)
    assert book.last("pg", "id") is None
    await end(book, await begin(book), PASSED)
    for _ in range(4):
        clock.ns += SECOND
        await end(book, await begin(book), FAILED)
    book = DrillBook(node)
    assert results(book) == [(3, FAILED), (4, FAILED), (5, FAILED)]
    last = book.last("pg", "id")
    assert last is not None
    assert (last["result"], last["last_passed_at"]) == (FAILED, "2023-11-14T22:13:20.000Z")


async def test_a_drill_that_never_ended_is_interrupted_once_its_view_is_gone(
    node: NodeContext, clock: HandClock
) -> None:
    book = DrillBook(node)
    await begin(book)
    assert results(book) == [(1, "running")]
    assert book.last("pg", "id") is None
    clock.ns += 61 * SECOND
    assert results(DrillBook(node)) == [(1, "interrupted")]
    last = book.last("pg", "id")
    assert last is not None
    assert last["last_passed_at"] is None


async def test_a_drill_is_found_by_its_number(node: NodeContext) -> None:
    book = DrillBook(node)
    drill = await begin(book)
    assert book.running("pg", "id") == [drill]
    assert book.find("pg", "id", 1) is drill
    await end(book, drill, PASSED)
    assert book.running("pg", "id") == []
    with pytest.raises(NotFoundError):
        book.find("pg", "id", 2)


async def test_a_resource_of_the_same_name_begins_anew(node: NodeContext) -> None:
    book = DrillBook(node)
    await end(book, await begin(book), PASSED)
    (node.resource_dir("pg") / "drills.json").unlink()
    assert book.last("pg", "another") is None


async def test_a_damaged_file_is_named_and_breaks_only_drills(node: NodeContext) -> None:
    path = node.resource_dir("pg") / "drills.json"
    path.write_bytes(b'{"drills": 7')
    book = DrillBook(node)
    last = book.last("pg", "id")
    assert last is not None
    assert str(path) in last["reason"]
    with pytest.raises(IntegrityError, match="move it away"):
        await begin(book)


@pytest.mark.parametrize(
    ("last", "code"),
    [(None, OK), ({"result": PASSED}, OK), ({"result": FAILED, "reason": "exit code 3"}, WARNING)],
)
def test_monitoring_warns_of_a_failed_drill(last: dict[str, str] | None, code: int) -> None:
    peer = {"node": "west-1", "disk_state": "UpToDate", "rpo_seconds": 0.1}
    found, text = judge({"peers": [peer], "last_drill": last}, 60, 300)
    assert found == code
    assert ("exit code 3" in text) == (code == WARNING)
