"""The order in which `make test` plays the files."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import BURNING_EACH, LONGEST, order_of_files

ROOT = Path(__file__).parent


def order(*names: str) -> list[str]:
    found = order_of_files(ROOT / name for name in names)
    return sorted(names, key=lambda name: found[ROOT / name])


def test_long_files_come_first_and_short_ones_last() -> None:
    short, long = "volume/test_undo.py", f"system/{LONGEST[0]}.py"
    assert order(short, "lab/test_lab.py", "system/test_views.py", long) == [
        *(long, "system/test_views.py", "lab/test_lab.py", short)
    ]


def test_a_file_that_burns_goes_beside_some_that_wait() -> None:
    burning = ["sim/test_seeds.py", "sim/test_sim.py"]
    waiting = [f"system/test_{letter}.py" for letter in "abcd"]
    found = order("test_config.py", *waiting, *burning)
    assert [found.index(name) for name in burning] == [0, BURNING_EACH + 1]
    assert found[-1] == "test_config.py"


def test_the_longest_files_are_there() -> None:
    names = {path.stem for path in ROOT.rglob("test_*.py")}
    assert set(LONGEST) <= names
