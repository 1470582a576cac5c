"""Volumes that grow and are added while everything else goes on, as the node's service does it."""

from __future__ import annotations

import random

from geomirror.errors import GeomirrorError
from geomirror.volume.volume_change import VolumeChange
from geomirror.wan_protocol.primary import Primary
from tests.sim.node import SimNode
from tests.sim.world import World

STEPS = (512, 1536, 4096, 5 * 4096, 33 * 4096 + 512, 70 * 4096)
VOLUMES_MAX = 4
GARBAGE_BYTES = 100_000
VOLUME_BYTES_MAX = 1 << 20


def draw_growth(seed: int) -> float:
    """Chance of a growth after each round of writes; none in half of the runs."""
    return random.Random(f"{seed}/growth").choice([0.0, 0.0, 0.02, 0.1])


def leave_garbage(node: SimNode) -> None:
    """Behind the ends of the volumes: a device is larger, and was used before."""
    with node.store.undisturbed():
        for image in node.engine.images.values():
            image.file.pwritev([node.store.random.randbytes(GARBAGE_BYTES)], image.size_bytes)
            image.file.fdatasync()


class Grower:
    """Grows a volume of the primary or adds one."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.count = 0

    def grow(self, node: SimNode) -> None:
        """Prepare the backing, then journal the change; a crash may come anywhere."""
        sizes, chance = node.engine.sizes.now, self._world.random
        index = int(chance.random() * (len(sizes) + 1))
        old = sizes.get(index, 0)
        size = old + STEPS[int(chance.random() * len(STEPS))]
        if index < VOLUMES_MAX and size <= VOLUME_BYTES_MAX:
            change = VolumeChange(index, str(index), old, size)
            node.call(lambda: self._grow(node, change))

    def _grow(self, node: SimNode, change: VolumeChange) -> None:
        engine, core = node.engine, node.core
        assert isinstance(core, Primary)
        engine.check_growth(change)
        try:
            job = engine.grow_job_for([change])
            if job is not None:
                job.run()
                engine.complete_grow(job)
            number = core.grow(change, node.now_ns(), node.wall_ns())
        except GeomirrorError as error:
            self._world.note(f"{node.name}: does not grow: {error}")
            return
        self.count += 1
        self._world.note(f"{node.name}: {change} in epoch {number}")
