"""A lab of two real nodes, through the command line and from Python."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from geomirror.errors import GeomirrorError, NotFoundError, UsageError
from geomirror.lab.lab_io import Lab
from geomirror.lab.process_io import run
from geomirror.node.process_identity import start_time
from tests.lab.packet_support import need_packet_emulator

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


async def link_states(where: tuple[str, str]) -> dict[str, bool]:
    """Link → whether it is up, as `lab status` says."""
    found = (await lab_command("status", *where))["links"]
    return {"-".join(sorted(link["nodes"])): link["is_up"] for link in found}


async def until_states(where: tuple[str, str], wanted: dict[str, bool]) -> None:
    async with asyncio.timeout(30):
        while await link_states(where) != wanted:
            await asyncio.sleep(0.1)


async def test_flaps_and_partitions_are_commands(tmp_path: Path) -> None:
    where = ("--dir", str(tmp_path / "lab"))
    await lab_command("up", *where, "--sites", "3", "--background")
    try:
        up = {"a-b": True, "a-c": True, "b-c": True}
        assert await link_states(where) == up
        said = await lab_command("partition", "c", *where)
        assert (said["node"], said["is_up"]) == ("c", False)
        assert await link_states(where) == {"a-b": True, "a-c": False, "b-c": False}
        await lab_command("partition", "c", "--heal", *where)
        assert await link_states(where) == up
        # It returns at once; the outages come and go by themselves.
        flap = ("flap", "a-b", "--down", "3s", "--period", "6s")
        said = await lab_command(*flap, "--count", "2", *where)
        assert (said["link"], said["count"]) == ("a-b", 2)
        await until_states(where, up | {"a-b": False})
        await until_states(where, up)
        await until_states(where, up | {"a-b": False})
        await lab_command("flap", "a-b", "--count", "0", *where)
        await lab_command("link", "a-b", "up", *where)
        await until_states(where, up)
    finally:
        await lab_command("down", *where)


def netns() -> str:
    return subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True
    ).stdout


def test_namespaces_behind_packet_links_are_a_command() -> None:
    need_packet_emulator()
    command = [sys.executable, "-m", "geomirror", "lab", "packets", "--json"]
    command += ["--node", "left", "--node", "right", "--link", "left-right:rtt=60ms,rate=20mbit"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        text = ""
        while not text.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, f"it has ended: {text}"
            text += line
        nodes = json.loads(text)["nodes"]
        assert [node["name"] for node in nodes] == ["left", "right"]
        left, right = nodes
        assert left["namespace"] in netns() and right["namespace"] in netns()
        inside = ["ip", "netns", "exec", left["namespace"]]
        began = time.monotonic()
        done = subprocess.run(
            [*inside, sys.executable, "-c", CONNECT, right["ipv4"]], timeout=20, check=False
        )
        assert done.returncode == 0
        assert time.monotonic() - began > 0.06
    finally:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(30) == 0
    assert left["namespace"] not in netns() and right["namespace"] not in netns()


CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=10)
except ConnectionRefusedError:
    sys.exit(0)  # The other namespace has answered.
sys.exit(1)
"""


def test_a_lab_with_wrong_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Lab(tmp_path, nodes=[("east", "same"), ("west", "same")])
    with pytest.raises(UsageError):
        Lab(tmp_path, nodes=NODES, links={("east-1", "nowhere"): ""})
    with pytest.raises(NotFoundError):
        Lab(tmp_path, nodes=NODES).node("nowhere")
