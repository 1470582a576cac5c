"""Ways to break marks, for `mutations`."""

from __future__ import annotations

from typing import Any
from unittest import mock

from geomirror.volume.engine import Engine
from geomirror.wan_protocol.encode_unit import EncodeUnitJob
from geomirror.wan_protocol.replica import Replica

Patch = tuple[type | Any, str, Any]


def fold_swallows_mark() -> list[Patch]:
    """A fold goes on past the epoch of a mark."""
    real = Engine.load_epoch

    def load(self: EncodeUnitJob) -> list[Any]:
        epochs, total = [], 0
        for number in self.numbers:
            epoch = real(self.engine, number)
            total += epoch.raw_bytes()
            if epochs and total > self.raw_bytes_max:
                break
            epochs.append(epoch)
        return epochs

    return [(EncodeUnitJob, "_load", load)]


def pass_swallows_mark() -> list[Patch]:
    """An apply pass goes on past the epoch of a mark."""
    real = Replica._pass_end

    def pass_end(self: Replica) -> int:
        infos = self.engine.unapplied_epochs()
        unmarked = [info._replace(is_mark=False) for info in infos]
        with mock.patch.object(self.engine, "unapplied_epochs", return_value=unmarked):
            return real(self)

    return [(Replica, "_pass_end", pass_end)]


def name_after_epoch() -> list[Patch]:
    """A mark's name is written down when its epoch is durable already."""
    real = Engine.commit

    def commit(self: Engine, epoch: Any, wall_ns: int, mark: Any = None) -> None:
        real(self, epoch, wall_ns)

    return [(Engine, "commit", commit)]


MARK_MUTATIONS = (fold_swallows_mark, pass_swallows_mark, name_after_epoch)
