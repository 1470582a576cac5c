"""What `branch list` and `rewind --dry-run` say on a terminal."""

from __future__ import annotations

from geomirror.cli.branch import _table
from geomirror.cli.rewind import _done, _plan

TIME = "2026-01-31T12:03:20Z"


def branch(**changes):
    found = {
        "name": "rewind-0a0b0c0d",
        "base": {"generation": "00" * 16, "epoch": 40, "time": TIME},
        "end": {"generation": "00" * 16, "epoch": 45, "time": TIME},
        "created_at": TIME,
        "raw_bytes": 8192,
        "stored_bytes": 4096,
        "marks": [],
        "is_viewable": True,
    }
    return {**found, **changes}


def listed(*branches, **changes):
    found = {"resource": "pg", "branches": list(branches), "damaged": [], "alarm": ""}
    return {**found, "stored_bytes": 4096, "budget_bytes": 1 << 30, **changes}


def test_every_branch_is_a_row_also_a_damaged_one() -> None:
    lines = _table(listed(branch(), branch(is_viewable=False), damaged=["lost"])).splitlines()
    assert lines[0].split()[:3] == ["BRANCH", "FROM", "EPOCH"]
    assert lines[1].startswith("rewind-0a0b0c0d  40")
    assert lines[1].endswith("yes")
    assert "history does not reach back" in lines[2]
    assert lines[3].endswith("no: damaged")
    assert lines[4] == "4.0 KiB of 1.0 GiB"


def test_a_budget_that_is_almost_used_is_said() -> None:
    assert _table(listed(branch(), alarm="almost no room")).endswith("almost no room")
    assert _table(listed()) == '"pg" has no branches here'


def test_a_plan_says_what_it_cuts_off() -> None:
    cut = {"epochs": 3, "first_epoch": 41, "last_epoch": 43, "seconds": 2.0, "bytes": 8192}
    cut["is_exact"] = True
    plan = {"resource": "pg", "is_possible": True, "epoch": 40, "time": None, "cut_off": cut}
    plan["rollback"] = {"is_possible": True, "refusal": None, "has_resync": False}
    assert "epochs 41–43, 2.0 s, 8.0 KiB" in _plan(plan)
    assert "at most 8.0 KiB" in _plan({**plan, "cut_off": {**cut, "is_exact": False}})
    assert "taken back" not in _plan(plan)
    plan["cut_off"] = {**cut, "epochs": 1, "last_epoch": 41}
    assert "branch: epoch 41" in _plan(plan)
    large = {"is_possible": True, "refusal": None, "has_resync": True}
    large["one_epoch_bytes_max"] = 256 << 20
    assert "it is more than 256 MiB" in _plan({**plan, "rollback": large})
    refusal = {"message": "17 GiB", "hint": "geomirror branch export pg BRANCH FILE"}
    final = {"is_possible": False, "refusal": refusal, "has_resync": False}
    text = _plan({**plan, "rollback": final})
    assert "it cannot be taken back: 17 GiB" in text
    assert "branch export" in text
    done = {**plan, "branch": "rewind-1", "behind": [], "rollback": final}
    assert "rewind rollback" not in _done(done)
    assert "rewind rollback" in _done({**done, "rollback": plan["rollback"]})
    refusal = {"message": "it has clients", "hint": "detach"}
    assert "it has clients" in _plan({**plan, "is_possible": False, "refusal": refusal})
