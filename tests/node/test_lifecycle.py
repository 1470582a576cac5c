"""Revoke, rename, leave: who may ask for it, and what is refused; links are function calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from geomirror.errors import GeomirrorError, NotFoundError, RefusedError, UsageError
from geomirror.node.calls import Caller
from geomirror.node.definition_store import DefinitionStore, ResourceEntry
from geomirror.node.leave_calls import LeaveCalls
from geomirror.node.lifecycle_calls import LifecycleCalls
from geomirror.node.resource_definition import ResourceDefinition, VolumeDefinition
from geomirror.node.roster import Roster
from geomirror.tunnel.network_state_io import leaving_path
from tests.node.test_network_calls import Member, connect, settle
from tests.tunnel.network_kit import pair


class Node(Member):
    """A member with the methods of this page."""

    def __init__(self, site: Any) -> None:
        super().__init__(site)
        self.store = DefinitionStore(site.state.data_dir / "resources.json")
        self.roster = Roster(site.state.membership)
        LifecycleCalls(self.calls, self.store, self.changed).register(self.methods)
        LeaveCalls(self.calls, self.store, self.changed, self.no_tunnels).register(self.methods)

    async def no_tunnels(self) -> list[str]:
        return []

    def hold(self, name: str, primary: str, *secondaries: str) -> None:
        definition = ResourceDefinition(
            name=name,
            resource_id=name.encode().hex().ljust(32, "0"),
            version=1,
            primary=primary,
            secondaries=list(secondaries),
            volumes=[VolumeDefinition(0, "0", 1 << 20)],
        )
        self.store.put(ResourceEntry(definition, "active"))

    async def call(self, method: str, *, caller: str | None = None, **parameters: Any) -> Any:
        return await self.methods.dispatch(Caller(caller), method, parameters)


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[tuple[Node, Node]]:
    async with pair(tmp_path) as sites:
        east, west = Node(sites[0]), Node(sites[1])
        yield east, west
        for node in (east, west):
            await node.calls.stop()


def linked(east: Node, west: Node) -> None:
    connect(east, west)
    east.calls.link_up("west-1")
    west.calls.link_up("east-1")


@pytest.mark.parametrize("method", ["node.revoke", "node.rename", "node.leave"])
async def test_no_peer_may_ask_for_it(two: tuple[Node, Node], method: str) -> None:
    east, _ = two
    with pytest.raises(RefusedError, match="not open to other nodes"):
        await east.call(method, caller="west-1", name="east-1", new_name="mine")
    assert [m.name for m in east.state.membership.active()] == ["east-1", "west-1"]


async def test_only_the_authoritys_node_can_do_it_and_not_to_itself(
    two: tuple[Node, Node],
) -> None:
    east, west = two
    with pytest.raises(RefusedError) as caught:
        await west.call("node.revoke", name="east-1")
    assert caught.value.hint == 'run this command on "east-1"'
    with pytest.raises(RefusedError, match="does not hold the key"):
        await west.call("node.rename", name="west-1", new_name="west-9")
    with pytest.raises(RefusedError, match="cannot be revoked"):
        await east.call("node.revoke", name="east-1")
    with pytest.raises(RefusedError, match="cannot be revoked"):
        await east.call("membership.leave", caller="east-1")
    with pytest.raises(NotFoundError):
        await east.call("node.revoke", name="west-2")
    assert east.changes == 0


async def test_the_answer_names_the_resources_and_what_to_do(two: tuple[Node, Node]) -> None:
    east, _ = two
    east.hold("a", "west-1", "east-1")
    east.hold("b", "east-1", "west-1")
    east.hold("c", "east-1")
    found = await east.call("node.revoke", name="west-1")
    assert (found["told"], found["not_told"]) == ([], [])
    assert [(r["name"], r["role"], r["next"]) for r in found["resources"]] == [
        ("a", "primary", "geomirror failover a --to east-1"),
        ("b", "secondary", "geomirror resource remove-secondary b west-1"),
    ]
    changes = east.roster.changes(east.state.membership)
    assert changes == [("node_revoked", {"peer": "west-1"})]
    assert east.roster.changes(east.state.membership) == []


async def test_a_name_that_a_resource_anywhere_uses_stays(two: tuple[Node, Node]) -> None:
    east, west = two
    with pytest.raises(RefusedError, match="not connected"):
        await east.call("node.rename", name="west-1", new_name="west-9")
    linked(east, west)
    west.hold("pg", "east-1", "west-1")
    with pytest.raises(RefusedError, match='member of the resource "pg"'):
        await east.call("node.rename", name="west-1", new_name="west-9")
    west.store.remove(west.store.get("pg").definition.resource_id)
    found = await east.call("node.rename", name="west-1", new_name="west-9")
    assert (found["node"], found["old_name"]) == ("west-9", "west-1")
    # It knows by itself, over the link that had its old name.
    await settle(west)
    assert west.state.node == "west-9"
    assert west.state.is_renewal_due(0)
    assert east.roster.changes(east.state.membership) == [
        ("node_renamed", {"peer": "west-9", "old_name": "west-1"})
    ]


async def test_a_node_that_cannot_say_whether_it_uses_a_name_is_in_the_way(
    two: tuple[Node, Node],
) -> None:
    east, west = two
    linked(east, west)
    call = east.links.call

    async def old_version(peer: str, method: str, *more: Any) -> dict[str, Any]:
        if method == "node.uses":
            raise UsageError("unknown method 'node.uses'")
        return await call(peer, method, *more)

    east.links.call = old_version  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="runs a version"):
        await east.call("node.rename", name="west-1", new_name="west-9")
    assert east.state.membership.find("west-1") is not None


async def test_a_node_that_leaves_is_gone_for_the_authority(two: tuple[Node, Node]) -> None:
    east, _ = two
    with pytest.raises(UsageError):
        await east.call("membership.leave")
    found = await east.call("membership.leave", caller="west-1")
    assert found["node"] == "west-1"
    assert east.changes == 0  # not before the answer is on its way
    assert [(i.name, i.is_left) for i in east.state.membership.revocations.revoked] == [
        ("west-1", True)
    ]
    assert east.roster.changes(east.state.membership) == [("node_left", {"peer": "west-1"})]


async def test_leaving_is_refused_with_every_loss_named_and_nothing_has_begun(
    two: tuple[Node, Node],
) -> None:
    east, west = two
    west.hold("a", "east-1", "west-1")
    west.hold("b", "west-1", "east-1")
    west.hold("c", "west-1")
    with pytest.raises(RefusedError) as caught:
        await west.call("node.leave")
    assert '"a", east-1, is not connected' in caught.value.message
    for words in ('copy of "a"', 'what of "b"', 'all of "c"', "still lists"):
        assert words in caught.value.hint
    linked(east, west)
    with pytest.raises(RefusedError, match='primary of "b"') as caught:
        await west.call("node.leave")
    assert "switchover b --to east-1" in caught.value.hint
    assert "still lists" not in caught.value.hint
    with pytest.raises(GeomirrorError, match="holds the key of the network authority"):
        await east.call("node.leave", is_forced=True)
    for node in two:
        assert not leaving_path(node.state.data_dir).exists()
    assert east.state.membership.find("west-1") is not None
