"""Real daemons: a resource with copies is rewound; they go back, keep the tail, and follow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.support import until
from tests.system.trio import Trio, agreed, branch_letters, branches, put, trio

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Trio]:
    with trio(tmp_path) as found:
        yield found


def prepared(sites: Trio) -> None:
    """1 is marked, 2 came later; everybody has both."""
    a = sites[0]
    put(a, 0, "1")
    a.run("mark", "pg", "one")
    put(a, 1, "2")
    agreed(a, sites, "12")


def test_a_rewind_is_taken_back_everywhere(sites: Trio) -> None:
    prepared(sites)
    a, b, c = sites
    done = b.json("rewind", "pg", "--to", "one", "--yes")
    assert done["behind"] == []
    agreed(a, sites, "1-")
    assert branches(a) == branches(b) == branches(c) == [done["branch"]]
    assert [branch_letters(site, done["branch"], 2) for site in sites] == ["12"] * 3
    put(a, 2, "3")
    agreed(a, sites, "1-3")
    back = c.json("rewind", "rollback", "pg")
    assert (back["behind"], back["kept_at"]) == ([], [])
    agreed(a, sites, "12-")
    assert [branches(site) for site in sites] == [[back["branch"]]] * 3
    assert [branch_letters(site, back["branch"], 3) for site in sites] == ["1-3"] * 3
    put(a, 2, "4")
    agreed(a, sites, "124")


def test_a_rewind_is_committed_everywhere(sites: Trio) -> None:
    prepared(sites)
    a = sites[0]
    a.json("rewind", "pg", "--to", "one", "--yes")
    agreed(a, sites, "1-")
    done = a.json("rewind", "commit", "pg", "--yes")
    assert done["kept_at"] == []
    assert [branches(site) for site in sites] == [[], [], []]
    for site in sites:
        site.stop()
        site.restart()
    put(a, 2, "3")
    agreed(a, sites, "1-3")


def test_it_is_refused_while_a_copy_is_away(sites: Trio) -> None:
    prepared(sites)
    a, b, _ = sites
    b.stop()
    until(lambda: a.peer(peer="west-1")["state"] == "Disconnected")
    text = a.error("rewind", "pg", "--to", "one", "--yes", expected=5, code="refused")
    assert 'the copy of "pg" at west-1 is Disconnected' in text
    plan = a.json("rewind", "pg", "--to", "one", "--dry-run", expected=5)
    assert not plan["is_possible"]
    b.restart()
    agreed(a, sites, "12")
