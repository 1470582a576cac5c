"""A lab of two real nodes, through the command line and from Python."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from geomirror.errors import GeomirrorError, NotFoundError, UsageError
from geomirror.lab.lab_io import Lab
from geomirror.lab.process_io import run
from geomirror.node.process_identity import start_time

pytestmark = pytest.mark.system

NODES = [("east", "east-1"), ("west", "west-1")]


async def lab_command(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "geomirror", "lab", *arguments, "--json"]
    output = await run(command, timeout_s=60)
    assert output.returncode == 0, (output.stdout + output.stderr).decode()
    found: dict[str, Any] = json.loads(output.stdout)
    return found


async def test_two_nodes_see_each_other_and_survive_a_kill(tmp_path: Path) -> None:
    links = {("east-1", "west-1"): "rtt=10ms"}
    async with Lab(tmp_path / "lab", nodes=NODES, links=links) as lab:
        east, west = lab.nodes
        listed = await east.cli("node", "list", "--json")
        assert {node["node"] for node in listed["nodes"]} == {"east-1", "west-1"}
        with pytest.raises(NotFoundError, match="no resource"):
            await east.call("status", {"name": "nothing"})
        await west.kill()
        assert west.pid is None
        with pytest.raises(GeomirrorError):
            await west.cli("status", "--json")
        await west.start()
        assert (await west.call("status"))["node"] == "west-1"
        await asyncio.sleep(0.5)
        status = await lab.status()
        moved = [direction["bytes_delivered"] for direction in status["links"][0]["directions"]]
        assert all(moved)
    assert east.pid is None


async def test_a_lab_in_the_background_is_found_steered_and_stopped(tmp_path: Path) -> None:
    where = ("--dir", str(tmp_path / "lab"))
    state = await lab_command("up", *where, "--sites", "2", "--background")
    try:
        assert [node["name"] for node in state["nodes"]] == ["a", "b"]
        await lab_command("set", "a-b", "rate=10mbit", "loss=1%", *where)
        await lab_command("link", "a-b", "down", *where)
        status = await lab_command("status", *where)
        assert all(node["is_running"] for node in status["nodes"])
        assert not status["links"][0]["is_up"]
        settings = status["links"][0]["directions"][0]["settings"]
        assert settings["rate_bits_per_second"] == 10_000_000
        await lab_command("link", "a-b", "up", *where)
    finally:
        await lab_command("down", *where)
    assert not any(start_time(node["pid"]) for node in state["nodes"])
    assert not start_time(state["pid"])


def test_a_lab_with_wrong_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Lab(tmp_path, nodes=[("east", "same"), ("west", "same")])
    with pytest.raises(UsageError):
        Lab(tmp_path, nodes=NODES, links={("east-1", "nowhere"): ""})
    with pytest.raises(NotFoundError):
        Lab(tmp_path, nodes=NODES).node("nowhere")
