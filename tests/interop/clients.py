"""Other people's NBD clients: found, run to their end, their words given back."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """Path of a client, or the end of the test."""
    path = shutil.which(name)
    if path is not None:
        return path
    pytest.skip(f"{name} is not installed")


async def run(*command: str | Path, is_failure_wanted: bool = False) -> str:
    """Run a client beside the server in this loop; its output, both streams."""
    process = await asyncio.create_subprocess_exec(
        tool(str(command[0])),
        *map(str, command[1:]),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(120):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = output.decode(errors="replace")
    assert (process.returncode != 0) == is_failure_wanted, text
    return text
