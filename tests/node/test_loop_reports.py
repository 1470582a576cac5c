"""What the event loop reports: mistakes, and not everybody who hangs up."""

from __future__ import annotations

import asyncio
import logging

import pytest

from geomirror.node.run_io import report_unless_hung_up


@pytest.mark.parametrize(
    ("message", "error", "is_reported"),
    [
        ("Future exception was never retrieved", ConnectionResetError(), False),
        ("Future exception was never retrieved", ValueError("x"), True),
        ("Task exception was never retrieved", KeyError("x"), True),
        ("Exception in callback", ConnectionResetError(), True),
    ],
)
async def test_only_a_caller_that_hangs_up_is_no_report(
    message: str, error: Exception, is_reported: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="asyncio"):
        report_unless_hung_up(asyncio.get_running_loop(), {"message": message, "exception": error})
    assert bool(caplog.records) == is_reported
