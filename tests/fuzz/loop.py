"""One event loop for all inputs of a process, and its end: a loop that is only forgotten warns."""

from __future__ import annotations

import asyncio
import atexit

LOOP = asyncio.new_event_loop()


@atexit.register
def _close() -> None:
    """What an input left running is of no interest any more."""
    for task in asyncio.all_tasks(LOOP):
        task.cancel()
    LOOP.run_until_complete(asyncio.sleep(0))
    LOOP.close()
