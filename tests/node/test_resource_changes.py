"""Settings and secondaries of a resource change while it is in use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from geomirror.errors import NotFoundError, NotPrimaryError, RefusedError, UsageError
from geomirror.limits import MIB
from geomirror.node.calls import Caller
from tests.node.fakes import FakeNetwork

pytestmark = pytest.mark.asyncio


@pytest.fixture
async def network(tmp_path: Path) -> AsyncIterator[FakeNetwork]:
    """Three nodes; a and b are members of "pg", all links are up."""
    found = FakeNetwork(tmp_path, "a", "b", "c")
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        found.connect(one, other)
    a = found.nodes["a"]
    await a.ask("resource.create", name="pg", sizes=[MIB], primary="a", secondaries=["b"])
    await until(lambda: "pg" in found.nodes["b"].host.services)
    yield found
    await found.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def settings(network: FakeNetwork, node: str) -> dict[str, str]:
    return network.nodes[node].service("pg").definition.settings


async def test_settings_reach_every_member_and_outlive_a_restart(network: FakeNetwork):
    wanted = {"ack": "durable", "degrade_after": "10s"}
    result = await network.nodes["a"].ask("resource.set", name="pg", settings=wanted)
    assert result == {"name": "pg", "settings": wanted, "version": 2, "waits_for": []}
    assert settings(network, "a") == wanted
    await until(lambda: settings(network, "b") == wanted)
    shown = await network.nodes["b"].ask("resource.show", name="pg")
    assert shown["definition"]["settings"] == wanted
    # Any member may be asked; an empty value takes a setting back.
    await network.nodes["b"].ask("resource.set", name="pg", settings={"ack": ""})
    assert settings(network, "a") == {"degrade_after": "10s"}


@pytest.mark.parametrize(
    "wrong", [{"ack": "soon"}, {"ack.c": "durable"}, {"copies": "2", "ack": "durable"}, {"x": "y"}]
)
async def test_a_wrong_setting_changes_nothing(network: FakeNetwork, wrong: dict[str, str]):
    with pytest.raises(UsageError):
        await network.nodes["a"].ask("resource.set", name="pg", settings=wrong)
    assert settings(network, "a") == {}
    assert network.nodes["a"].store.get("pg").definition.version == 1


async def test_changed_settings_disturb_no_session(network: FakeNetwork):
    a = network.nodes["a"]
    before = list(a.service("pg").calls)
    network.nodes["b"].links.sent.clear()
    await a.ask("resource.set", name="pg", settings={"ack": "durable"})
    assert a.status.resource("pg")["peers"][0]["state"] == "Stream"
    await until(lambda: a.store.get("pg").pending_peers() == [])
    assert a.service("pg").calls == before


async def test_a_secondary_is_added_and_removed(network: FakeNetwork):
    a, c = network.nodes["a"], network.nodes["c"]
    await a.ask("resource.add_secondary", name="pg", node="c")
    await until(lambda: "pg" in c.host.services)
    assert a.service("pg").definition.secondaries == ["b", "c"]
    await until(lambda: network.nodes["b"].service("pg").definition.secondaries == ["b", "c"])
    with pytest.raises(RefusedError, match="member"):
        await a.ask("resource.add_secondary", name="pg", node="c")
    await a.ask("resource.set", name="pg", settings={"ack.c": "durable"})
    await c.ask("resource.remove_secondary", name="pg", node="c")
    await until(lambda: c.store.find("pg") is None)
    assert a.service("pg").definition.secondaries == ["b"]
    assert settings(network, "a") == {}
    assert not c.host.context.resource_dir("pg").exists()
    # And once more.
    await until(lambda: a.store.get("pg").leaving == {})
    await a.ask("resource.add_secondary", name="pg", node="c")
    await until(lambda: "pg" in c.host.services)


async def test_a_removed_secondary_that_is_away_forgets_it_when_it_is_back(network: FakeNetwork):
    a, b = network.nodes["a"], network.nodes["b"]
    network.cut("a", "b")
    result = await a.ask("resource.remove_secondary", name="pg", node="b")
    assert result["pending"] == ["b"]
    assert a.service("pg").definition.secondaries == []
    with pytest.raises(RefusedError, match="still has its part"):
        await a.ask("resource.add_secondary", name="pg", node="b")
    network.connect("a", "b")
    await until(lambda: b.store.find("pg") is None)
    await until(lambda: a.store.get("pg").pending_peers() == [])


async def test_a_deleted_resource_is_forgotten_by_those_that_were_leaving(network: FakeNetwork):
    a, b = network.nodes["a"], network.nodes["b"]
    network.cut("a", "b")
    await a.ask("resource.remove_secondary", name="pg", node="b")
    result = await a.ask("resource.delete", name="pg")
    assert result["pending"] == ["b"]
    network.connect("a", "b")
    await until(lambda: b.store.find("pg") is None)
    await until(lambda: a.store.entries() == [])


async def test_what_is_not_there_is_refused(network: FakeNetwork):
    a = network.nodes["a"]
    with pytest.raises(NotFoundError, match="no secondary"):
        await a.ask("resource.remove_secondary", name="pg", node="c")
    with pytest.raises(NotFoundError, match="no node"):
        await a.ask("resource.add_secondary", name="pg", node="z")
    with pytest.raises(NotFoundError, match="no resource"):
        await a.ask("resource.set", name="other", settings={})
    # A peer that asks the wrong node has an old view.
    with pytest.raises(NotPrimaryError):
        parameters = {"name": "pg", "settings": {}}
        await network.nodes["b"].methods.dispatch(Caller("c"), "resource.set", parameters)


async def test_a_node_that_is_no_member_is_told_nothing_of_a_resource(network: FakeNetwork):
    store = network.nodes["a"].store
    entry = store.get("pg")
    for member in (None, "a", "b"):
        assert store.asked_by(member, entry.definition.resource_id) is entry.definition
    with pytest.raises(RefusedError, match='node "c" is no member of "pg"'):
        store.asked_by("c", entry.definition.resource_id)
    entry.state = "deleting"
    for asking in ("b", "c"):
        with pytest.raises(NotFoundError):
            store.asked_by(asking, entry.definition.resource_id)
    entry.state = "active"
