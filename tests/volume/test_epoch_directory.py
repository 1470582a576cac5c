"""The directory of epochs: covering folds, floors for pins, dropping."""

from __future__ import annotations

import random

import pytest

from geomirror.errors import NotFoundError
from geomirror.volume.epoch_directory import EpochDirectory, EpochInfo


def info(number: int, floor: int, first: int | None = None) -> EpochInfo:
    first = number if first is None else first
    return EpochInfo(number, first, 10 * number, 1, 2, 3, floor, 4, 5, 6, 7, 8, bytes(32))


def test_a_fold_covers_all_its_numbers() -> None:
    directory = EpochDirectory()
    directory.append(info(3, 100))
    directory.append(info(7, 200, first=4))
    directory.append(info(8, 300))
    assert directory.numbers() == [3, 7, 8]
    assert [directory.info(n).number for n in (3, 4, 6, 7, 8)] == [3, 7, 7, 7, 8]
    for missing in (2, 9):
        with pytest.raises(NotFoundError, match=f"epoch {missing} is not in the journal"):
            directory.info(missing)
    assert [each.number for each in directory.after(3)] == [7, 8]
    last = directory.last()
    assert last is not None
    assert last == info(8, 300)


def test_epochs_that_do_not_follow_are_refused() -> None:
    directory = EpochDirectory()
    directory.append(info(3, 100))
    with pytest.raises(AssertionError):
        directory.append(info(5, 100))


def test_an_empty_directory_has_nothing() -> None:
    directory = EpochDirectory()
    assert len(directory) == 0
    assert directory.last() is None
    assert directory.first_after(0) is None
    assert directory.floor_after(0) is None
    directory.drop_through(9)
    assert directory.numbers() == []


def test_floors_are_the_lowest_of_all_later_epochs_at_any_time() -> None:
    chance = random.Random(3)
    directory = EpochDirectory()
    floors: dict[int, int] = {}
    number = 0
    for _ in range(500):
        if chance.random() < 0.7:
            number += 1
            floors[number] = chance.randrange(number * 10, number * 10 + 100)
            directory.append(info(number, floors[number]))
        elif floors:
            through = chance.choice([*floors])
            directory.drop_through(through)
            floors = {n: f for n, f in floors.items() if n > through}
        epoch = chance.randrange(number + 2)
        later = [floor for n, floor in floors.items() if n > epoch]
        assert directory.floor_after(epoch) == min(later, default=None)
        assert directory.numbers() == [*floors]
        first = directory.first_after(epoch)
        assert (first.number if first else None) == min(
            (n for n in floors if n > epoch), default=None
        )
