"""Links between nodes of a network: they carry bytes, and only between the right nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from network_kit import Collect, pair


async def test_a_link_carries_bytes_both_ways(tmp_path: Path) -> None:
    async with pair(tmp_path) as (east, west):
        transport, protocol = await west.driver.dial("east-1", east.endpoint, Collect)
        assert east.accepted[0].peer == "west-1"
        transport.write(b"hello")
        assert await protocol.wait(5) == b"hello"
        transport.close()
        await protocol.lost
