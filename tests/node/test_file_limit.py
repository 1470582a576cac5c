"""Journals that could not be kept open are refused before they are made."""

from __future__ import annotations

import resource

import pytest

from geomirror.errors import RefusedError
from geomirror.limits import GIB, PRODUCTION
from geomirror.node.file_limit import (
    FILES_ASIDE,
    circuits_that_fit,
    raise_file_limit,
    require_files,
)


def test_the_soft_limit_becomes_the_hard_one() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        assert raise_file_limit() == before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_all_journals_together_have_to_fit() -> None:
    require_files([64 * GIB], PRODUCTION, 1025 + FILES_ASIDE)
    with pytest.raises(RefusedError, match="1025 journal segments"):
        require_files([64 * GIB], PRODUCTION, 1024 + FILES_ASIDE)
    with pytest.raises(RefusedError, match="open files"):
        require_files([GIB] * 10, PRODUCTION, 300)


def test_circuits_take_no_file_that_a_journal_may_need() -> None:
    assert circuits_that_fit([64 * GIB], PRODUCTION, 1 << 20) == PRODUCTION.circuits_max
    assert circuits_that_fit([64 * GIB], PRODUCTION, 1025 + FILES_ASIDE) == 64
    assert circuits_that_fit([], PRODUCTION, 1024) == 448
    assert circuits_that_fit([64 * GIB], PRODUCTION, 512) == 0
