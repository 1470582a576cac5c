"""For all tests: hypothesis judges answers, not the speed of a machine that does other things, what
a daemon's start does to its process ends with the test, and the long files come first."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


LONG_FIRST = ("system", "soak", "sim", "interop", "bench", "lab")
"""Directories whose files take tens of seconds, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of seconds fill what is left: with a long file last, one of two workers has nothing to
    do for minutes. (`make test` tells the workers' scheduler to keep this order.)"""
    rank = {name: i for i, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(rank)))


@pytest.fixture(autouse=True)
def _own_umask() -> Iterator[None]:
    """`node run` in a test's own process closes its files to others: not those of the next test."""
    before = os.umask(0o022)
    yield
    os.umask(before)
