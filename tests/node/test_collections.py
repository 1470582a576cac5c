"""What a daemon has loaded when it has started is not gone through again and again."""

from __future__ import annotations

import asyncio
import gc
from typing import Any, cast

import pytest

from geomirror.errors import GeomirrorError
from geomirror.node.run_io import serve


class FailingNode:
    """Starts, and has failed then."""

    def __init__(self, *_: object) -> None:
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def start(self, _: object) -> None:
        assert gc.get_freeze_count() == 0
        self.failed.set_result(ValueError("a bug"))

    async def stop(self) -> bool:
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < 1_000
        return True

    def reload(self) -> None:
        raise AssertionError("not asked for")


async def test_collections_pass_over_what_was_there_at_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("geomirror.node.node.Node", FailingNode)
    unused = cast(Any, None)
    try:
        with pytest.raises(GeomirrorError, match="a bug"):
            await serve(unused, unused, unused, unused)
    finally:
        gc.unfreeze()
