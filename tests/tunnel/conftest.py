"""What more than one file needs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import pytest

LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop]
with contextlib.suppress(ImportError):
    import uvloop  # an optional dependency

    LOOPS.append(uvloop.new_event_loop)


@pytest.fixture(params=LOOPS, ids=lambda loop: loop.__module__.split(".")[0])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    """Runs a story on each of the event loops that the daemon may have."""
    with asyncio.Runner(loop_factory=request.param) as found:
        yield found
