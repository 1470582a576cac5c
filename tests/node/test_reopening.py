"""A resource that cannot be opened for a reason that may pass is opened when it has passed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from geomirror.errors import FencedError, GeomirrorError, InUseError, NoSpaceError
from geomirror.limits import MIB
from geomirror.node import resource_host
from tests.node.fakes import FakeNetwork, FakeNode

pytestmark = pytest.mark.asyncio
ERRORS = [InUseError("/dev/x is held", hint="stop its user"), NoSpaceError("write y: no space")]


@pytest.fixture
async def a(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeNode]:
    monkeypatch.setattr(resource_host, "RETRY_S", 0.01)
    network = FakeNetwork(tmp_path, "a", "b")
    network.connect("a", "b")
    node = network.nodes["a"]
    await node.ask("resource.create", name="pg", sizes=[MIB], primary="a", secondaries=["b"])
    await network.settle()
    yield node
    await node.host.close_all()
    await network.stop()


async def fail_to_open(node: FakeNode, error: GeomirrorError) -> None:
    definition = node.service("pg").definition
    await node.host.close("pg")
    node.factory.error = error
    await node.host.open(definition)
    assert "pg" not in node.host.services


@pytest.mark.parametrize("error", ERRORS, ids=str)
async def test_it_is_served_when_the_cause_has_passed(a: FakeNode, error: GeomirrorError):
    await fail_to_open(a, error)
    found = a.status.resource("pg")
    assert found["state"] == "failed"
    assert "tried again" in found["error"]["hint"]
    await asyncio.sleep(0.1)
    assert a.host.failures
    a.factory.error = None
    async with asyncio.timeout(5):
        while "pg" not in a.host.services:
            await asyncio.sleep(0.005)
    assert not a.host.failures
    assert ("link_up", "b") in a.service("pg").calls, "and takes part again"


async def test_what_does_not_pass_is_not_tried_again(a: FakeNode):
    await fail_to_open(a, FencedError("damaged"))
    a.factory.error = None
    await asyncio.sleep(0.1)
    assert "pg" in a.host.failures
    assert a.status.resource("pg")["error"]["hint"] == ""


async def test_a_closed_resource_is_not_opened_any_more(a: FakeNode):
    await fail_to_open(a, NoSpaceError("write y: no space"))
    await a.host.close("pg")
    a.factory.error = None
    await asyncio.sleep(0.1)
    assert not a.host.services
