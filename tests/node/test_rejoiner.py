"""A member with a tail comes back: asked for once, tried until it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from geomirror.errors import RefusedError
from geomirror.node.branch_calls import BranchCalls, OfBranch
from geomirror.node.calls import Caller
from geomirror.node.rejoiner import RETRY_S, Rejoiner


class Desk:
    """Branches of one member; one more fits once one is dropped."""

    def __init__(self) -> None:
        self.names = ["old"]

    def check_needless(self, name: str) -> None:
        raise RefusedError(f"{name} is the way back")

    async def drop(self, name: str) -> None:
        self.names.remove(name)


class Member:
    """What a rejoiner and `branch drop` see of a service."""

    def __init__(self) -> None:
        self.definition = SimpleNamespace(name="pg")
        self.role = "secondary"
        self.is_outranked = True
        self.must_reopen = False
        self.rejoins_by_itself = False
        self.rejoin_refusal = ""
        self.above = "generation 2"
        self.branches = Desk()
        self.on_outranked: Callable[[], None] = lambda: None
        self.on_rejoined: Callable[[str], None] = lambda by: None
        self.attempts = 0

    def tail(self) -> dict[str, Any]:
        return {"other": {"node": "west-1", "generation": self.above}}

    async def follow(self, *, gives_up_tail: bool) -> str:
        assert gives_up_tail
        self.attempts += 1
        if self.branches.names:
            raise RefusedError("one more branch does not fit")
        self.branches.names.append("orphan")
        self.is_outranked, self.rejoin_refusal = False, ""
        self.on_rejoined("west-1")
        return "orphan"


class Node:
    """One member, its rejoiner, and the call that drops branches."""

    def __init__(self) -> None:
        self.member = Member()
        self.events: list[str] = []
        host = SimpleNamespace(
            get=lambda name: self.member,
            services={"pg": self.member},
            context=SimpleNamespace(
                name="east-1", emit=lambda kind, fields: self.events.append(kind)
            ),
        )
        store = SimpleNamespace(get=lambda name: None, find=lambda name: None)
        calls = SimpleNamespace(host=host, store=store)
        self.rejoiner = Rejoiner(cast(Any, calls))
        self.rejoiner.watch(cast(Any, self.member))
        views = SimpleNamespace(elsewhere=lambda name, node: None)
        self.branch_calls = BranchCalls(cast(Any, calls), cast(Any, views))

    async def drop(self, name: str) -> None:
        await self.branch_calls.drop(Caller(), OfBranch("pg", name))
        await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
async def node() -> Any:
    found = Node()
    yield found
    found.rejoiner.stop()


async def test_what_an_operator_asked_for_is_done_once_there_is_room(node: Node) -> None:
    with pytest.raises(RefusedError, match="does not fit"):
        await node.rejoiner.bring_back_now("pg")
    assert "does not fit" in node.member.rejoin_refusal
    assert node.events == ["rejoin_stopped"]
    # Nobody has to ask again: neither now …
    timer = node.rejoiner._retries["pg"]
    assert timer.when() == pytest.approx(asyncio.get_running_loop().time() + RETRY_S, abs=1)
    # … nor for as long as that takes, when room is made.
    await node.drop("old")
    assert not node.member.is_outranked
    assert node.member.branches.names == ["orphan"]
    assert timer.cancelled()
    assert await node.rejoiner.bring_back_now("pg") == "orphan", "it says what came of it"


async def test_nothing_is_given_up_that_nobody_asked_for(node: Node) -> None:
    await node.drop("old")
    assert node.member.attempts == 0


async def test_another_history_is_another_question(node: Node) -> None:
    with pytest.raises(RefusedError):
        await node.rejoiner.bring_back_now("pg")
    node.member.above = "generation 3"
    await node.drop("old")
    assert node.member.attempts == 1
    assert node.member.is_outranked


async def test_the_way_back_of_a_rewind_is_not_dropped_at_its_primary(node: Node) -> None:
    node.member.role = "primary"
    with pytest.raises(RefusedError, match="way back"):
        await node.drop("old")
    assert node.member.branches.names == ["old"]
