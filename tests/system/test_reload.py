"""SIGHUP at a running daemon: what the reference calls reloadable has its effect at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomirror.lab.ports_io import free_port
from tests.system.support import (
    MIB,
    Site,
    count_links,
    create,
    make_network,
    some_sites,
    until,
    wait_applied,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
RATE_BITS = 8_000_000
SENT_BYTES = 3 * MIB


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    with some_sites(tmp_path, "a", "b") as (a, b):
        make_network(a, b)
        yield a, b
        assert a.crashes() == b.crashes() == []


def configure(site: Site, text: str) -> None:
    path = site.data_dir / "geomirror.toml"
    path.write_text(text)
    path.chmod(0o600)


def last_error(site: Site) -> str | None:
    """Why the last attempt of its one link failed."""
    (link,) = site.call("link.list")["links"]
    found: str | None = link["last_error"]
    return found


def reload(site: Site, text: str, *changed: str) -> None:
    """Change the file, signal, and wait until the daemon says which keys it took over."""
    before = len(site.events("configuration_reloaded"))
    configure(site, text)
    assert site.process is not None
    site.process.send_signal(signal.SIGHUP)
    until(lambda: len(site.events("configuration_reloaded")) > before, what="reload")
    event = site.events("configuration_reloaded")[-1]
    assert (event["changed"], event["restart_needed_for"]) == (list(changed), [])


def test_a_peer_is_found_at_the_endpoint_that_was_reloaded(pair: tuple[Site, Site]) -> None:
    a, b = pair
    moved = free_port()
    b.stop()
    # It listens elsewhere, and cannot say so: where it looks for the other nobody is.
    nobody = f'[peers.east-1]\nendpoints = ["127.0.0.1:{free_port()}"]\n'
    configure(b, f'[node]\nlisten = "127.0.0.1:{moved}"\n{nobody}')
    b.restart()
    until(lambda: count_links(a) == 0, what="the link is gone")
    until(lambda: last_error(a) and last_error(b), what="both tried in vain")
    assert (count_links(a), count_links(b)) == (0, 0)
    reload(a, f'[peers.west-1]\nendpoints = ["127.0.0.1:{moved}"]\n', "peers")
    until(lambda: count_links(a) == 1 == count_links(b), what="the link is back")


def seconds_to_send(a: Site, seed: int) -> float:
    """For so many random bytes to be at the copy."""
    data = os.urandom(SENT_BYTES)
    began = time.monotonic()
    asyncio.run(a.write(seed * SENT_BYTES, data))
    wait_applied(a)
    return time.monotonic() - began


def test_a_rate_that_is_reloaded_limits_the_link_from_then_on(pair: tuple[Site, Site]) -> None:
    a, _ = pair
    create(a, "pg")
    wait_applied(a)
    free_s = seconds_to_send(a, 0)
    reload(a, f"[links]\nrate_bits_per_second = {RATE_BITS}\n", "links.rate_bits_per_second")
    limited_s = seconds_to_send(a, 1)
    reload(a, "", "links.rate_bits_per_second")
    free_again_s = seconds_to_send(a, 2)
    at_least_s = 0.8 * SENT_BYTES * 8 / RATE_BITS
    assert limited_s > at_least_s, (free_s, limited_s, free_again_s)
    assert max(free_s, free_again_s) < limited_s


def test_a_log_level_that_is_reloaded_decides_what_is_logged(pair: tuple[Site, Site]) -> None:
    a, _ = pair
    create(a, "one", size="1M", secondary=None)
    reload(a, '[log]\nlevel = "error"\n', "log.level")
    assert "configuration_reloaded" not in a.log(), "the level is taken over first"
    length = len(a.log())
    create(a, "two", size="1M", secondary=None)
    a.run("resource", "delete", "two", "--yes")
    assert len(a.log()) == length
    reload(a, '[log]\nlevel = "info"\n', "log.level")
    assert "configuration_reloaded" in until(lambda: a.log()[length:])


def secrets_of(site: Site) -> list[str]:
    """Every line of every secret that its data directory holds."""
    files = [path for path in site.data_dir.rglob("*") if path.suffix in (".key", ".json")]
    lines = [line for path in files if "key" in path.name for line in path.read_text().split("\n")]
    return [line for line in lines if len(line) > 40 and not line.startswith("-----")]


def test_debug_says_how_links_and_sessions_come_about_and_no_secret(
    pair: tuple[Site, Site],
) -> None:
    a, b = pair
    create(a, "pg")
    wait_applied(a)
    steps = ("link_dialled", "link_not_made", "session_step", "pass_ended")
    assert not any(step in a.log() + b.log() for step in steps), "not at the level info"
    reload(a, '[log]\nlevel = "debug"\n', "log.level")
    reload(b, '[log]\nlevel = "debug"\n', "log.level")
    length = len(a.log())
    b.stop()
    until(lambda: "link_not_made" in a.log()[length:], what="it is dialled in vain")
    b.restart()
    token = a.set_up("token", "create", "--site", "north").strip()
    asyncio.run(a.write(0, os.urandom(MIB)))
    wait_applied(a)
    said = a.log()[length:]
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    found = {line["event"]: line for line in lines if line.get("level") == "debug"}
    assert {"link_dialled", "link_not_made", "session_step"} <= set(found), set(found)
    assert found["link_not_made"]["next_s"] > 0
    told = [(line["way"], line["step"]) for line in lines if line["event"] == "session_step"]
    assert ("sent", "open") in told and ("received", "accept") in told
    until(lambda: "pass_ended" in b.log() and "pass_ended" in a.log(), what="both applied it")
    everything = a.log() + b.log()
    assert len(secrets_of(a)) > 1
    assert not any(secret in everything for secret in [token, *secrets_of(a), *secrets_of(b)])
