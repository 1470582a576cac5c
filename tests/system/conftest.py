"""What more than one story needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.pgbench import public_directory


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that PostgreSQL's user reaches, removed afterwards."""
    with public_directory() as path:
        yield path
