"""For all tests: hypothesis judges answers, not the speed of a machine that does other things, and
what a daemon's start does to its process ends with the test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _own_umask() -> Iterator[None]:
    """`node run` in a test's own process closes its files to others: not those of the next test."""
    before = os.umask(0o022)
    yield
    os.umask(before)
