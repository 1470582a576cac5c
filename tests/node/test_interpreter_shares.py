"""Who waits for the interpreter while a thread computes: the loop, and not for long."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from geomirror.node.run_io import share_interpreter


@pytest.fixture
def default_interval() -> Iterator[float]:
    """Python's own, whatever another test's node has set in this process."""
    found = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield 0.005
    sys.setswitchinterval(found)


def test_a_thread_that_computes_gives_way_within_half_a_millisecond(
    default_interval: float,
) -> None:
    assert sys.getswitchinterval() == pytest.approx(default_interval)
    share_interpreter()
    assert sys.getswitchinterval() == pytest.approx(0.0005)
