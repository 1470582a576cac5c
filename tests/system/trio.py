"""Three nodes with one resource, and a primary that is lost while its copies are apart."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geomirror.nbd.client_io import NbdClient
from tests.system.support import MIB, Site, create, make_network, some_sites, until

CHUNK = MIB // 4
Trio = tuple[Site, Site, Site]
NODES = {"a": "east-1", "b": "west-1", "c": "north-1"}


@contextmanager
def trio(root: Path, *options: str) -> Iterator[Trio]:
    """ "pg" has its primary at the first, east-1, and copies at west-1 and north-1."""
    with some_sites(root, "a", "b", "c") as (a, b, c):
        make_network(a, b, c)
        create(a, "pg", "--secondary", "north-1", *options)
        until(lambda: streams(a, "west-1", "north-1"), what="both copies are there")
        yield a, b, c


def put(site: Site, chunk: int, letter: str, name: str = "pg") -> None:
    asyncio.run(site.write(chunk * CHUNK, letter.encode() * CHUNK, name))


def letters(site: Site, count: int) -> str:
    """The first byte of each of the first chunks."""

    async def read() -> str:
        async with await NbdClient.connect(site.uri()) as client:
            found = [bytes(await client.read(at * CHUNK, CHUNK)) for at in range(count)]
        assert all(len(set(chunk)) == 1 for chunk in found), "a chunk is torn"
        return "".join(chr(chunk[0]) if chunk[0] else "-" for chunk in found)

    return asyncio.run(read())


def streams(site: Site, *peers: str) -> bool:
    """Whether the primary streams to all of them, and they have everything."""
    found = {p["node"]: (p["state"], p["disk_state"]) for p in site.status()["peers"]}
    return all(found.get(name) == ("Stream", "UpToDate") for name in peers)


def outranked(site: Site, state: str) -> dict[str, Any]:
    """The tail of a member that knows durably that a higher token exists."""
    tail: dict[str, Any] = until(lambda: site.status().get("superseded"), what=f"{site.name} knows")
    assert site.status()["state"] == state
    return tail


def has_all(site: Site, peer: str) -> bool:
    """Whether a copy has applied all that the primary has sealed, and nothing is open."""
    status = site.status()
    found = next(each for each in status["peers"] if each["node"] == peer)
    is_there = found["position"]["applied_epoch"] == status["position"]["epoch"]
    return is_there and found["lag"]["seconds"] == 0.0


def is_alone(site: Site) -> bool:
    """Whether the first primary does not answer this node any more."""
    found = site.call("failover.assess", name="pg", to=NODES[site.name])
    return not found["primary"]["is_reachable"]


def apart(sites: Trio) -> None:
    """All have 1; the primary is lost when west-1 has 2, too, and north-1 has not."""
    a, b, c = sites
    put(a, 0, "1")
    a.call("resource.wait", name="pg", kind="applied", timeout_s=60)
    a.call("resource.pause", name="pg", peer="north-1")
    put(a, 1, "2")
    until(lambda: has_all(a, "west-1"), what="west-1 has what north-1 has not")
    a.kill()
    until(lambda: is_alone(b) and is_alone(c), what="the primary is gone")


def promote(site: Site) -> dict[str, Any]:
    return site.call("promotion.failover", name="pg", to=NODES[site.name])


def agreed(primary: Site, sites: Sequence[Site], wanted: str) -> None:
    """All are in sync, without ever having been copied anew, and hold this."""
    others = [NODES[site.name] for site in sites if site is not primary]
    until(
        lambda: streams(primary, *others) and all(has_all(primary, other) for other in others),
        60,
        what="all follow",
    )
    assert [letters(site, len(wanted)) for site in sites] == [wanted] * len(sites)
    found = {p["node"]: p["resyncs"] for p in primary.status()["peers"]}
    assert [found[name] for name in others] == [0] * len(others), found
    for site in sites:
        assert site.crashes() == [], site.name


def branches(site: Site) -> list[str]:
    return [each["name"] for each in site.call("branch.list", name="pg")["branches"]]


def branch_letters(site: Site, branch: str, count: int) -> str:
    """What a branch shows."""
    made = site.json("branch", "view", "pg", branch)

    async def read() -> str:
        async with await NbdClient.connect(made["nbd_uri"]) as client:
            found = [bytes(await client.read(at * CHUNK, 1)) for at in range(count)]
        return "".join(chr(byte[0]) if byte[0] else "-" for byte in found)

    text = asyncio.run(read())
    site.run("view", "delete", "pg", made["name"])
    return text
