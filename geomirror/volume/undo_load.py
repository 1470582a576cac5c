"""What undo files a directory has at a start.

A file is taken by what it says itself. One that is damaged behind its header is a gap; one whose
header is damaged says nothing: what it was of shows in the epochs that are missing around it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from geomirror.errors import IntegrityError
from geomirror.volume.store import File, Store
from geomirror.volume.undo_faults import DAMAGED
from geomirror.volume.undo_file import PassInfo, UndoReader, read_header

DIRECTORY = "undo"
SUFFIX = ".und"
OPEN_SUFFIX = ".open"
MERGED = ".m"
"""Between the number of the newest of the merged passes and how often it was merged."""


@dataclass
class FoundUndo:
    """What there is."""

    passes: list[PassInfo] = field(default_factory=list)
    """Oldest first."""
    damaged: dict[str, IntegrityError] = field(default_factory=dict)
    """By file, those whose header says nothing."""
    next_number: int = 1


def find_undo(store: Store, open_stem: str) -> FoundUndo:
    """Look at every file; what a crash left is removed.

    :param open_stem: number of the open pass's file, which is left alone.
    :raises StorageError: the directory cannot be read.
    """
    found = FoundUndo()
    for name in store.list(DIRECTORY):
        if name.partition(".")[0] == open_stem:
            continue
        if name.endswith(OPEN_SUFFIX):
            store.unlink(f"{DIRECTORY}/{name}")  # Its pass never began, or was undone.
        if not name.endswith(SUFFIX):
            continue
        path = f"{DIRECTORY}/{name}"
        found.next_number = max(found.next_number, number_of(path) + 1)
        file = store.open(path)
        try:
            found.passes.append(inspect(file, path))
        except IntegrityError as error:
            found.damaged[path] = error
        finally:
            file.close()
    passes = found.passes
    merged = [each for each in passes if MERGED in each.name and not each.is_gap]
    covered = {each.name for each in passes if any(_covers(big, each) for big in merged)}
    found.passes = [each for each in passes if each.name not in covered]
    for name in sorted(covered):
        store.unlink(name)
    return found


def inspect(file: File, name: str) -> PassInfo:
    """What the file is; one that is damaged behind its header is a gap.

    :raises IntegrityError: its header is damaged.
    """
    info = read_header(file, name)
    try:
        return UndoReader(file, name).info
    except IntegrityError:
        return replace(info, fault=DAMAGED)


def number_of(name: str) -> int:
    """The number of an undo file."""
    return int(name.removeprefix(f"{DIRECTORY}/").partition(".")[0], 16)


def _covers(merged: PassInfo, other: PassInfo) -> bool:
    """Whether `other` is one of the passes that `merged` took the place of."""
    is_within = merged.from_epoch <= other.from_epoch and other.to_epoch <= merged.to_epoch
    return is_within and other.name != merged.name
