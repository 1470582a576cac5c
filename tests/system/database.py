"""Whether the tests may have a PostgreSQL of their own; the cluster itself is `bench.database`."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.database import AS_USER, Cluster, find_programs
from tests.system.support import is_root

__all__ = ["AS_USER", "Cluster", "require_postgres"]


def require_postgres() -> Path:
    """Where PostgreSQL's programs are; skips with the reason."""
    if not is_root():
        pytest.skip("mounts and another user's database need root")
    found = find_programs()
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    return found
