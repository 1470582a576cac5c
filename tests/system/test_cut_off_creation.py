"""A secondary that is stopped while it makes its part of a resource makes it when it is back."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from tests.system.support import Site, create, make_network, some_sites, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
MOMENTS_S = (0.0, 0.05, 0.2, 0.5)


def is_current(site: Site, name: str) -> bool:
    return bool(site.peer(name)["disk_state"] == "UpToDate")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_in_the_middle_of_a_creation_needs_no_hand(
    tmp_path: Path, number: signal.Signals
) -> None:
    with some_sites(tmp_path, "a", "b") as (a, b):
        make_network(a, b)
        for at, seconds in enumerate(MOMENTS_S):
            name = f"pg{at}"
            create(a, name, size="8M")
            time.sleep(seconds)  # The moment of the cut: there is no event in the middle.
            b.stop(number)
            b.restart()
            until(lambda name=name: is_current(a, name), what=f"{name} at west-1")
            asyncio.run(a.write(0, b"all the same", name))
            a.call("resource.wait", name=name, kind="applied", timeout_s=60)
            assert asyncio.run(b.read(0, 12, name)) == b"all the same"
        assert a.crashes() == b.crashes() == []


def test_what_is_another_resource_stays_untouched(tmp_path: Path) -> None:
    with some_sites(tmp_path, "a", "b") as (a, b):
        make_network(a, b)
        left = b.data_dir / "resources/pg/volumes"
        left.mkdir(parents=True, mode=0o700)
        (left / "0.img").write_bytes(b"of somebody else")
        create(a, "pg", size="8M")
        event = until(lambda: a.events("definition_pending"), what="it is said")[0]
        assert "resources/pg is in the way" in event["reason"]
        assert "move it away" in event["reason"]
        assert (left / "0.img").read_bytes() == b"of somebody else"
        (b.data_dir / "resources/pg").rename(tmp_path / "away")
        until(lambda: is_current(a, "pg"), what="it is made")
