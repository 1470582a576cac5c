"""The life of a resource on three nodes whose links are function calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from geomirror.errors import (
    FencedError,
    LinkError,
    NoSpaceError,
    NotFoundError,
    NotPrimaryError,
    RefusedError,
    UsageError,
    WaitTimeoutError,
)
from geomirror.limits import MIB
from geomirror.node.calls import Caller
from geomirror.wan_protocol.messages import SessionOpen, SessionRefuse
from tests.node.fakes import FakeNetwork

pytestmark = pytest.mark.asyncio
Members = {"primary": "a", "secondaries": ["b"]}


@pytest.fixture
async def network(tmp_path: Path) -> AsyncIterator[FakeNetwork]:
    found = FakeNetwork(tmp_path, "a", "b", "c")
    yield found
    await found.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_linked_secondary_has_the_resource_soon_after_create(network):
    network.connect("a", "b")
    result = await network.nodes["a"].ask("resource.create", name="pg", sizes=[MIB], **Members)
    assert result["resource"]["name"] == "pg"
    await until(lambda: "pg" in network.nodes["b"].host.services)
    assert network.nodes["b"].service("pg").role == "secondary"
    await until(lambda: ("link_up", "b") in network.nodes["a"].service("pg").calls)
    assert ("link_up", "a") in network.nodes["b"].service("pg").calls


async def test_an_unreachable_secondary_is_pending_and_gets_it_when_its_link_is_up(network):
    a, b = network.nodes["a"], network.nodes["b"]
    result = await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    assert result["pending"] == ["b"]
    assert a.status.resource("pg")["peers"][0]["state"] == "Pending"
    network.connect("a", "b")
    # Not before the secondary has confirmed: it would refuse the session.
    assert ("link_up", "b") not in a.service("pg").calls
    await until(lambda: ("link_up", "b") in a.service("pg").calls)
    assert "pg" in b.host.services
    assert a.status.resource("pg")["peers"][0]["state"] == "Stream"


async def test_a_confirmed_secondary_gets_its_session_at_once_after_a_flap(network):
    a = network.nodes["a"]
    network.connect("a", "b")
    await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    await until(lambda: ("link_up", "b") in a.service("pg").calls)
    network.cut("a", "b")
    assert a.service("pg").calls[-1] == ("link_down", "b")
    network.connect("a", "b")
    assert a.service("pg").calls[-1] == ("link_up", "b")


async def test_create_on_any_node_is_done_by_the_primary(network):
    network.connect("a", "c")
    result = await network.nodes["c"].ask("resource.create", name="pg", sizes=[MIB], **Members)
    assert result["resource"]["role"] == "primary"
    assert "pg" in network.nodes["a"].host.services
    assert network.nodes["c"].host.services == {}


async def test_create_fails_when_the_primary_cannot_be_reached(network):
    with pytest.raises(LinkError):
        await network.nodes["c"].ask("resource.create", name="pg", sizes=[MIB], **Members)


async def test_a_forwarded_call_is_not_forwarded_again(network):
    with pytest.raises(NotPrimaryError, match='"a" is'):
        await network.nodes["b"].methods.dispatch(
            Caller("c"), "resource.create", {"name": "pg", "sizes": [MIB], **Members}
        )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"name": "../etc"}, UsageError, "not allowed"),
        ({"sizes": [1000]}, UsageError, "multiple of 512"),
        ({"sizes": []}, UsageError, "give --size"),
        ({"secondaries": ["a"]}, UsageError, "twice"),
        ({"secondaries": ["nobody"]}, NotFoundError, "nobody"),
        ({"adopt": "b"}, UsageError, "primary"),
        ({"adopt": "a"}, UsageError, "--backing"),
        ({"backings": {"z": {"0": "/x"}}}, UsageError, "no member"),
        ({"backings": {"a": {"7": "/tmp/x"}}}, UsageError, "no such volume"),
        ({"journal_bytes": 4096}, UsageError, "--journal-size"),
        ({"sizes": ["1G"]}, UsageError, "resource.create"),
        ({"colour": "red"}, UsageError, "colour"),
    ],
)
async def test_what_cannot_be_created(network, change, error, text):
    parameters = {"name": "pg", "sizes": [MIB], **Members, **change}
    with pytest.raises(error) as caught:
        await network.nodes["a"].ask("resource.create", **parameters)
    assert text in str(caught.value)
    assert network.nodes["a"].store.entries() == []


async def test_the_same_name_twice_is_refused_and_the_first_one_stays(network):
    a = network.nodes["a"]
    await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    with pytest.raises(RefusedError, match="exists"):
        await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    assert "pg" in a.host.services


async def test_a_creation_that_fails_leaves_nothing(network):
    a = network.nodes["a"]
    a.factory.error = NoSpaceError("write journal: no space")
    with pytest.raises(NoSpaceError):
        await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    assert a.store.entries() == []
    assert not (a.root / "resources/pg").exists()
    a.factory.error = None
    await a.ask("resource.create", name="pg", sizes=[MIB], **Members)


async def test_backing_with_data_is_refused_on_either_side_without_force(network, tmp_path):
    network.connect("a", "b")
    full = tmp_path / "full.img"
    full.write_bytes(b"x" * MIB)
    for node in ("a", "b"):
        backings = {node: {"0": str(full)}}
        with pytest.raises(RefusedError, match="holds data"):
            await network.nodes["a"].ask(
                "resource.create", name="pg", sizes=[MIB], backings=backings, **Members
            )
    await network.nodes["a"].ask(
        "resource.create",
        name="pg",
        sizes=[MIB],
        backings={"a": {"0": str(full)}},
        is_forced=True,
        **Members,
    )
    assert full.read_bytes() == bytes(MIB)


async def test_an_adopted_device_gives_the_size_and_keeps_its_content(network, tmp_path):
    full = tmp_path / "full.img"
    full.write_bytes(b"x" * MIB)
    result = await network.nodes["a"].ask(
        "resource.create", name="pg", backings={"a": {"0": str(full)}}, adopt="a", **Members
    )
    assert result["resource"]["volumes"][0]["size_bytes"] == MIB
    assert full.read_bytes() == b"x" * MIB


async def test_delete_reaches_the_secondary_later_and_frees_the_name_at_once(network):
    a, b = network.nodes["a"], network.nodes["b"]
    network.connect("a", "b")
    await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    await until(lambda: "pg" in b.host.services)
    network.cut("a", "b")
    result = await a.ask("resource.delete", name="pg")
    assert result["pending"] == ["b"]
    assert not (a.root / "resources/pg").exists()
    assert "pg/0" in a.disconnected
    await a.ask("resource.create", name="pg", sizes=[2 * MIB], **Members)
    network.connect("a", "b")
    await until(lambda: a.push.is_confirmed("pg", "b"))
    assert b.service("pg").definition.size_bytes == 2 * MIB
    assert [entry.state for entry in a.store.entries()] == ["active"]


async def test_delete_with_keep_data_leaves_images_on_both_sides(network):
    a, b = network.nodes["a"], network.nodes["b"]
    network.connect("a", "b")
    await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    await until(lambda: "pg" in b.host.services)
    result = await a.ask("resource.delete", name="pg", keep_data=True)
    assert result["kept"] == [str(a.root / "kept/pg/0.img")]
    await until(lambda: (b.root / "kept/pg/0.img").exists())
    await until(lambda: a.store.entries() == [])
    await until(lambda: b.store.entries() == [])


async def test_delete_from_a_secondary_is_done_by_the_primary(network):
    network.connect("a", "b")
    await network.nodes["a"].ask("resource.create", name="pg", sizes=[MIB], **Members)
    await until(lambda: "pg" in network.nodes["b"].host.services)
    await network.nodes["b"].ask("resource.delete", name="pg")
    assert network.nodes["a"].host.services == {}
    await until(lambda: network.nodes["b"].host.services == {})


async def test_only_the_primary_may_define_or_delete(network):
    a, b = network.nodes["a"], network.nodes["b"]
    network.connect("a", "b")
    await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    await until(lambda: "pg" in b.host.services)
    definition = (await b.ask("resource.show", name="pg"))["definition"]
    forged = {**definition, "version": 2, "primary": "c", "secondaries": ["b"]}
    for caller, raw in (("c", {**definition, "version": 2}), ("c", forged)):
        with pytest.raises(RefusedError):
            await b.methods.dispatch(Caller(caller), "resource.define", {"definition": raw})
    with pytest.raises(NotPrimaryError):
        identity = definition["resource_id"]
        await b.methods.dispatch(
            Caller("c"), "resource.forget", {"name": "pg", "resource_id": identity}
        )
    assert "pg" in b.host.services


async def test_wait_pause_and_resume_go_to_the_primary(network):
    a, b = network.nodes["a"], network.nodes["b"]
    network.connect("a", "b")
    await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    await until(lambda: "pg" in b.host.services)
    assert (await b.ask("resource.wait", name="pg", kind="applied", timeout_s=1.0))["position"] == {
        "epoch": 7,
        "lsn": 4096,
    }
    await b.ask("resource.pause", name="pg", peer="b")
    await a.ask("resource.resume", name="pg")
    assert a.service("pg").calls[-3:] == [("wait", "applied"), ("pause", "b"), ("resume", None)]
    with pytest.raises(NotFoundError, match="no secondary"):
        await a.ask("resource.pause", name="pg", peer="c")
    a.service("pg").is_up_to_date = False
    with pytest.raises(WaitTimeoutError):
        await a.ask("resource.wait", name="pg", timeout_s=0.0)


async def test_a_resource_that_cannot_be_opened_says_why_and_refuses_sessions(network):
    a, b = network.nodes["a"], network.nodes["b"]
    network.connect("a", "b")
    await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    await until(lambda: a.push.is_confirmed("pg", "b"))
    definition = b.store.get("pg").definition
    await b.host.close("pg")
    b.factory.error = FencedError("journal damaged at 4096", hint="restore it")
    await b.host.open(definition)
    found = b.status.resource("pg")
    assert (found["state"], found["error"]["code"]) == ("failed", "fenced")
    opening = SessionOpen(definition.session, b"", "pg", [], [], 0, b"")
    b.router.message("a", definition.session, opening)
    (_, _, refusal) = b.links.sent[-1]
    assert isinstance(refusal, SessionRefuse)
    assert refusal.error_code == FencedError.wire_code
    with pytest.raises(FencedError):
        await b.ask(
            "resource.define", definition=(await a.ask("resource.show", name="pg"))["definition"]
        )


async def test_a_session_waits_while_its_resource_is_being_opened(network):
    a, b = network.nodes["a"], network.nodes["b"]
    network.connect("a", "b")
    await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    await until(lambda: a.push.is_confirmed("pg", "b"))
    definition = b.store.get("pg").definition
    await b.host.close("pg")
    opening = asyncio.ensure_future(b.host.open(definition))
    await asyncio.sleep(0)
    asked = SessionOpen(definition.session, b"", "pg", [], [], 0, b"")
    b.router.message("a", definition.session, asked)
    assert b.links.sent == []
    await opening
    assert b.service("pg").calls[-1] == ("message", "a", asked)


async def test_a_secondary_that_lost_everything_is_given_the_definition_again(network, tmp_path):
    a, b = network.nodes["a"], network.nodes["b"]
    network.connect("a", "b")
    await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    await until(lambda: a.push.is_confirmed("pg", "b"))
    definition = a.store.get("pg").definition
    await b.ask("resource.forget", name="pg", resource_id=definition.resource_id)
    assert b.host.services == {}
    refusal = SessionRefuse(definition.session, NotFoundError.wire_code, "no resource")
    a.router.message("b", definition.session, refusal)
    await until(lambda: "pg" in b.host.services)


async def test_messages_and_frames_of_strangers_are_dropped(network):
    a, b = network.nodes["a"], network.nodes["b"]
    network.connect("a", "b")
    await a.ask("resource.create", name="pg", sizes=[MIB], **Members)
    await until(lambda: "pg" in b.host.services)
    session = a.store.get("pg").definition.session
    before = list(b.service("pg").calls)
    b.router.frame("c", session, 1, 0, False, b"")
    b.router.message("c", session, SessionRefuse(session, 5, ""))
    assert b.service("pg").calls == before
    b.router.frame("a", session, 1, 0, False, b"")
    assert b.service("pg").calls[-1] == ("frame", "a")
