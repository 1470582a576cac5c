"""The README's commands are read from it and played by a shell, as whoever follows it would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from geomirror.lab.ports_io import free_port
from tests.system.support import MIB

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
README = Path(__file__).parents[2] / "README.md"
PORTS = ("7701", "7702")


def blocks() -> list[str]:
    """The shell blocks of the quick start, in order."""
    text = README.read_text()
    part = text.partition("\n## Quick start")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```$", part, flags=re.M | re.S)


def block_with(words: str) -> str:
    (found,) = [block for block in blocks() if words in block]
    return found


class Shell:
    """Plays blocks in one directory; daemons that a block leaves in the background end with it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # `pip install` puts the command beside Python; pip's own tests put it in PATH.
        beside = Path(sys.executable).parent
        self.environment = {**os.environ, "PATH": f"{beside}:{os.environ['PATH']}"}

    def play(self, *texts: str) -> str:
        """One shell for all; its output. Any command that fails ends it."""
        # A signal to the shell's jobs only, by their numbers.
        end = "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n"
        script = "set -euo pipefail\n" + end + "\n".join(texts)
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self._directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout


WRITE = """
import asyncio, json, sys
from geomirror.nbd.client_io import NbdClient

def uri(path):
    return json.load(open(path))["resources"][0]["volumes"][0]["nbd_uri"]

async def main():
    async with await NbdClient.connect(uri("a.json")) as client:
        await client.write(12345, b"as the README says")
        await client.flush()

async def read():
    async with await NbdClient.connect(uri("b.json")) as client:
        print(bytes(await client.read(12345, 18)).decode())

asyncio.run(main() if sys.argv[1] == "write" else read())
"""


def test_the_quick_start_as_it_is_printed(tmp_path: Path) -> None:
    start = block_with("network create")
    for words in ("node run &", "token create", 'join "$TOKEN"', "resource create", "wait pg"):
        assert words in start
    # Only the ports differ: others may use this machine at the same time.
    for port in PORTS:
        assert f":{port}" in start
        start = start.replace(f":{port}", f":{free_port()}")
    (tmp_path / "client.py").write_text(WRITE)
    python = f"'{sys.executable}' client.py"
    status = "geomirror --data-dir {0} status pg --json > {0}.json"
    wait = next(line for line in start.splitlines() if " wait pg " in line)
    shell = Shell(tmp_path)
    further = [
        status.format("a"),
        f"{python} write",
        wait,
        status.format("b"),
        f"{python} read",
        # From here on as on a machine of one's own, where nobody says --data-dir.
        "export GEOMIRROR_DATA_DIR=$PWD/a",
        block_with("volume resize"),
        *commands(block_with("geomirror mark"), "geomirror mark", "geomirror timeline"),
        status.format("a"),
    ]
    if shutil.which("nbdinfo"):
        further += commands(block_with("nbdinfo --"), "nbdinfo --")
    said = shell.play(start, *further)
    assert "pg  primary" in said
    assert "as the README says" in said
    assert "before-upgrade" in said
    (resource,) = json.loads((tmp_path / "a.json").read_text())["resources"]
    sizes = {volume["name"]: volume["size_bytes"] for volume in resource["volumes"]}
    assert sizes == {"0": 2048 * MIB, "wal": 10240 * MIB}


def commands(block: str, *beginnings: str) -> list[str]:
    """Those lines of a block, without the remarks behind them."""
    found = [line.partition("  #")[0] for line in block.splitlines() if line.startswith(beginnings)]
    assert len(found) >= len(beginnings)
    return found


def test_every_command_of_the_readme_exists(tmp_path: Path) -> None:
    """What cannot be played here (devices, other machines) is at least a command."""
    words = set(
        re.findall(r"\bgeomirror (?:--data-dir \w+ )?([a-z]+(?: [a-z]+)?)", README.read_text())
    )
    known = Shell(tmp_path).play("geomirror --help")
    groups = {word.split()[0] for word in words}
    prose = {"learnt"}
    for group in sorted(groups - prose):
        assert re.search(rf"\b{group}\b", known), group
