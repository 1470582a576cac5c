"""Options of `[nbd]`: one writer at a time, and volumes that nobody writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from geomirror.errors import GeomirrorError, RefusedError
from geomirror.nbd.client_io import NbdClient
from tests.system.support import Site, some_sites

pytestmark = pytest.mark.system


@contextmanager
def served(root: Path, options: str) -> Iterator[Site]:
    """A node with these options that is the primary of "pg"."""
    with some_sites(root, "east-1") as (site,):
        site.run(
            *("network", "create", "acme", "--site", "east", "--node", "east-1"),
            *("--listen", f"127.0.0.1:{site.port}"),
        )
        path = site.data_dir / "geomirror.toml"
        path.write_text(f"[nbd]\n{options}\n")
        path.chmod(0o600)
        site.restart()
        site.run("resource", "create", "pg", "--size", "16M", "--primary", "east-1")
        yield site


async def test_a_second_connection_is_refused_while_one_is_attached(tmp_path: Path) -> None:
    with served(tmp_path, "single_writer = true") as site:
        uri = site.uri("pg")
        first = await NbdClient.connect(uri)
        with pytest.raises(GeomirrorError, match="has a writer already"):
            await NbdClient.connect(uri)
        await first.write(0, b"x" * 4096)
        await first.close()
        second = await NbdClient.connect(uri)
        assert await second.read(0, 4) == b"xxxx"
        await second.close()


async def test_a_read_only_primary_takes_no_write(tmp_path: Path) -> None:
    with served(tmp_path, "read_only = true") as site:
        client = await NbdClient.connect(site.uri("pg"))
        with pytest.raises(RefusedError):
            await client.write(0, b"x" * 4096)
        assert await client.read(0, 4) == bytes(4)
        await client.close()
