"""For all tests: hypothesis judges answers, not the speed of a machine that does other things, what
a daemon's start does to its process ends with the test, the long files come first, and in CI
nothing is skipped."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


WAITING = ("system", "soak", "interop", "bench", "lab")
"""Directories whose files take tens of seconds, and mostly wait for processes and links."""
LONGEST = (
    "test_packet_wan",
    "test_attach",
    "test_bench_smoke",
    "test_power_cut",
    "test_quickstart",
    "test_resync_cuts",
    "test_history_damage",
    "test_virtual_network",
    "test_full_disk",
)
"""Of these the files that take more than a minute."""
BURNING = "sim"
"""The directory whose files take as long, and nothing but CPU."""
BURNING_EACH = 3
"""One worker burns while the others (`-n 4`, Makefile) wait."""


LARGE_BYTES = 4096
"""From here on the difference of two byte strings is not drawn."""
SKIPPED_IN_CI: dict[str, str] = {}
"""Beginning of a skip's reason → why no CI can have what it lacks. Nothing is: what a kernel may
lack (nbd, WireGuard, network emulation) the product does without, and its tests with it."""


def is_ci() -> bool:
    """Whether a test that cannot run is a failure: nobody reads the reasons of CI's skips."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def skip_reason(longrepr: object) -> str:
    """What a skipped test or file said."""
    text = str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI a skip is a failure, unless its reason is listed."""
    if not report.skipped or not is_ci() or hasattr(report, "wasxfail"):
        return
    reason = skip_reason(report.longrepr)
    if not any(reason.startswith(known) for known in SKIPPED_IN_CI):
        report.outcome = "failed"
        report.longrepr = f"skipped, and CI skips nothing: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of each phase of a test."""
    report = yield
    refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Of a file that skips itself as a whole."""
    report = yield
    refuse_skip(report)
    return report


def order_of_files(paths: Iterable[Path]) -> dict[Path, float]:
    """Where each file goes: long ones first, one that burns among those that wait.

    Files of seconds fill what is left: with a long file last, all workers but one have nothing to
    do for minutes.
    """

    def haste(path: Path) -> tuple[int, int]:
        is_known = path.stem in LONGEST
        place = LONGEST.index(path.stem) if is_known else len(LONGEST)
        return place, WAITING.index(path.parent.name)

    known = list(dict.fromkeys(paths))
    waiting = sorted((path for path in known if path.parent.name in WAITING), key=haste)
    burning = [path for path in known if path.parent.name == BURNING]
    found = dict.fromkeys(known, float(len(known) * BURNING_EACH))
    found.update((path, at) for at, path in enumerate(waiting))
    found.update((path, at * BURNING_EACH - 0.5) for at, path in enumerate(burning))
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` tells the workers' scheduler to keep this order."""
    order = order_of_files(item.path for item in items)
    items.sort(key=lambda item: order[item.path])


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Contents of disks are told apart by where they differ: a diff of megabytes takes minutes."""
    if op != "==" or not isinstance(left, bytes) or not isinstance(right, bytes):
        return None
    if max(len(left), len(right)) < LARGE_BYTES:
        return None
    both = zip(left, right, strict=False)
    at = next((n for n, (a, b) in enumerate(both) if a != b), min(len(left), len(right)))
    context = f"{left[at : at + 16].hex(' ')} and {right[at : at + 16].hex(' ')}"
    return [f"{len(left)} bytes == {len(right)} bytes", f"they differ from byte {at} on: {context}"]


@pytest.fixture(autouse=True)
def _own_umask() -> Iterator[None]:
    """`node run` in a test's own process closes its files to others: not those of the next test."""
    before = os.umask(0o022)
    yield
    os.umask(before)
