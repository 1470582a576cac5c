"""`switchover --dry-run` and `demote --dry-run`: each reason for which the command would refuse."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from geomirror.cli.demote import _text as demote_text
from geomirror.cli.switchover import _dry
from geomirror.errors import NotFoundError, NotPrimaryError, RefusedError
from geomirror.limits import MIB
from geomirror.node.failover_calls import FailoverCalls
from geomirror.node.promotion_calls import PromotionCalls
from tests.node.fakes import FakeNetwork, FakeNode, FakeService

LAG = {"epochs": 3, "bytes": 4096, "seconds": 0.5}
GOOD: dict[str, Any] = {"node": "b", "state": "Stream", "disk_state": "UpToDate", "lag": LAG}
RETURNING = {"kind": "return", "epoch": 41, "bytes_left": 3 * MIB}
OF_THE_HEIR = [
    ({"peers": [{**GOOD, "state": "Disconnected"}]}, "b is Disconnected, and has to stream"),
    ({"peers": [{**GOOD, "state": "Paused"}]}, "b is Paused, and has to stream"),
    ({"peers": [{**GOOD, "state": "Resync", "disk_state": "Consistent"}]}, "b is Resync"),
    ({"peers": [{**GOOD, "disk_state": "Inconsistent"}]}, "the copy at b is Inconsistent"),
    ({"peers": []}, "b is unknown"),
]
OF_THE_PRIMARY = [
    ({"role": "secondary"}, "a is a secondary"),
    ({"reason": "superseded: token 3"}, "superseded: token 3"),
    ({"behind": RETURNING}, "still going back to epoch 41, 3.0 MiB are left"),
]


class Stated(FakeService):
    """Says what the test wants."""

    said: dict[str, Any] = {}  # noqa: RUF012

    def status(self) -> dict[str, Any]:
        usual = {"role": "primary", "reason": "", "behind": None, "peers": [GOOD]}
        return {**super().status(), **usual, **self.said}

    async def hand_over(self, heirs: list[str], timeout_s: float) -> dict[str, Any]:
        raise AssertionError("a dry run hands nothing over, nor a command that is refused")


@pytest.fixture
async def primary(tmp_path: Path) -> AsyncIterator[FakeNode]:
    network = FakeNetwork(tmp_path, "a", "b")
    node = network.nodes["a"]
    failover = FailoverCalls(node.host, node.store, node.links, node.router.is_up)
    PromotionCalls(node.calls, failover).register(node.methods)
    await node.ask("resource.create", name="pg", sizes=[MIB], primary="a", secondaries=["b"])
    service = node.service("pg")
    node.host.services["pg"] = Stated(service.definition, service.node)  # type: ignore[assignment]
    yield node
    await network.stop()


async def both(node: FakeNode, method: str, said: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The verdict of the dry run, after the command was refused for the same reason."""
    service = node.host.services["pg"]
    assert isinstance(service, Stated)
    service.said = said
    found = await node.ask(method, name="pg", is_dry_run=True, **more)
    with pytest.raises(RefusedError) as refused:
        await node.ask(method, name="pg", **more)
    assert found["refusal"] in refused.value.message
    return found


@pytest.mark.asyncio
@pytest.mark.parametrize(("said", "why"), OF_THE_HEIR + OF_THE_PRIMARY)
async def test_a_switchover_is_refused_and_its_dry_run_says_why(primary, said, why):
    found = await both(primary, "promotion.switchover", said, to="b")
    assert (found["is_possible"], why in found["refusal"]) == (False, True)
    assert f"b cannot take over: {found['refusal']}" in _dry(found)


@pytest.mark.asyncio
async def test_that_it_is_the_primary_already_is_a_verdict(primary):
    found = await both(primary, "promotion.switchover", {}, to="a")
    assert found["refusal"] == 'it is the primary of "pg" already'
    assert found["lag"] is None
    assert "a cannot take over: it is the primary" in _dry(found)


@pytest.mark.asyncio
async def test_a_possible_switchover_says_how_far_the_heir_is_behind(primary):
    found = await primary.ask("promotion.switchover", name="pg", to="b", is_dry_run=True)
    assert (found["is_possible"], found["refusal"], found["lag"]) == (True, "", LAG)
    assert "b can take over from a; it is 3 epochs, 4.0 KiB, 0.5 s behind" in _dry(found)
    with pytest.raises(NotFoundError):
        await primary.ask("promotion.switchover", name="pg", to="c", is_dry_run=True)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("said", "why"),
    [(said, "no copy is streaming") for said, _ in OF_THE_HEIR] + OF_THE_PRIMARY,
)
async def test_a_demotion_is_refused_and_its_dry_run_says_why(primary, said, why):
    found = await both(primary, "promotion.demote", said)
    assert (found["is_possible"], why in found["refusal"]) == (False, True)
    assert "cannot stop being the primary" in demote_text(found, is_dry_run=True)


@pytest.mark.asyncio
async def test_a_possible_demotion_names_the_heirs(primary):
    found = await primary.ask("promotion.demote", name="pg", is_dry_run=True)
    assert (found["is_possible"], found["heirs"], found["lag"]) == (True, ["b"], {"b": LAG})
    assert "b is 3 epochs" in demote_text(found, is_dry_run=True)


@pytest.mark.asyncio
async def test_without_a_link_to_the_primary_nobody_else_can_say(primary):
    entry = primary.store.get("pg")
    changed = entry.definition.with_primary("b", 2)
    primary.store.put(type(entry)(changed, "active"))
    with pytest.raises(NotPrimaryError, match="no link to b"):
        await primary.ask("promotion.demote", name="pg", is_dry_run=True)
