"""Volumes that grow or are added, as messages carry them.

A change travels in the commit of its epoch, and the chain hash covers it. Frames may come before
that commit, so a frame names the sizes of volumes that changed since the epoch that the peer had
durable (`docs/wire_format.md`, kind 3); whether they are right is known at the commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from geomirror.volume.engine import Engine
from geomirror.volume.volume_change import VolumeChange, change_problem
from geomirror.wan_protocol.messages import VolumeInfo


def volumes_at(engine: Engine, epoch: int) -> list[VolumeInfo]:
    """Volumes as they are at an epoch, with all that a copy made anew has to know of them.

    At a secondary, which nobody is made anew from, one that was added by an epoch that is not
    applied yet has no record, and its size is all there is to know.
    """
    records = {record.index: record for record in engine.superblock.volumes}
    found: list[VolumeInfo] = []
    for index, size_bytes in sorted(engine.sizes.at(epoch).items()):
        name, record = engine.sizes.names[index], records.get(index)
        backings, is_forced = ({}, False) if record is None else (record.peers, record.is_forced)
        found.append(VolumeInfo(index, name, size_bytes, 0, dict(backings), is_forced))
    return found


def change_infos(changes: Iterable[VolumeChange]) -> list[VolumeInfo]:
    """Changes as they are sent."""
    return [
        VolumeInfo(c.index, c.name, c.size_bytes, c.old_size_bytes, dict(c.backings), c.is_forced)
        for c in changes
    ]


def changes_of(infos: Iterable[VolumeInfo]) -> tuple[VolumeChange, ...]:
    """What `change_infos` was made from; nothing in it is checked."""
    return tuple(
        VolumeChange(i.index, i.name, i.old_size_bytes, i.size_bytes, dict(i.backings), i.is_forced)
        for i in infos
    )


def changes_to(infos: Iterable[VolumeInfo], sizes: Mapping[int, int]) -> tuple[VolumeChange, ...]:
    """What leads from these sizes to the volumes of `volumes_at`."""
    return tuple(
        VolumeChange(
            i.index, i.name, sizes.get(i.index, 0), i.size_bytes, dict(i.backings), i.is_forced
        )
        for i in infos
        if i.size_bytes != sizes.get(i.index, 0)
    )


def growth_problem(engine: Engine, changes: Sequence[VolumeChange]) -> str:
    """Why these cannot follow the volumes that are here, "" if they can."""
    names, sizes = dict(engine.sizes.names), dict(engine.sizes.now)
    for change in changes:
        what = change_problem(change, names, sizes, engine.limits)
        if what:
            return what
        names[change.index], sizes[change.index] = change.name, change.size_bytes
    return ""
