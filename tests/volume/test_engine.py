"""The engine against its model: any order of calls, crashes anywhere, always a legal state."""

from __future__ import annotations

import pytest

from tests.volume.engine_rig import Rig, Stop


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_calls_agrees_with_the_model(seed: int) -> None:
    rig = Rig(seed)
    for _ in range(250):
        rig.random_action()
    rig.read()
    rig.check_epochs()
    rig.make_room()
    rig.check_images()
    assert rig.engine.dirty_entries == 0
    assert rig.engine.applied_epoch == rig.engine.sealed_epoch > 3


@pytest.mark.parametrize("seed", range(25))
def test_a_crash_anywhere_leaves_a_prefix_and_every_sealed_epoch(seed: int) -> None:
    rig = Rig(100 + seed)
    for _ in range(6):
        left = rig.random.randrange(5, 250)

        def count(operation: str, name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop(f"{operation} {name}")

        rig.store.on_operation = count
        with pytest.raises(Stop):
            while True:
                rig.random_action()
        rig.store.on_operation = None
        if rig.random.random() < 0.3:
            left = rig.random.randrange(1, 40)
            rig.store.on_operation = count
        rig.recover(lose_nothing=rig.random.random() < 0.3)
        rig.store.on_operation = None
    for _ in range(20):
        rig.random_action()
    rig.make_room()
    rig.check_images()
