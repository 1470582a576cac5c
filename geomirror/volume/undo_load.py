"""What undo files a directory has at a start.

A file is taken by what it says itself. One that is damaged behind its header is a gap; one whose
header is damaged says nothing: what it was of shows in the epochs that are missing around it.
Of thousands only the header and the size are looked at, and the tables of the newest: those of the
others are read within minutes (`UndoStore.look_at_tables`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from geomirror.errors import IntegrityError
from geomirror.volume.store import File, Store
from geomirror.volume.undo_faults import DAMAGED
from geomirror.volume.undo_file import PassInfo, UndoReader
from geomirror.volume.undo_header import read_header

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
    unseen: list[str] = field(default_factory=list)
    """Files whose tables were not looked at, ascending."""
    next_number: int = 1


def find_undo(store: Store, open_stem: str, inspected_max: int) -> FoundUndo:
    """Look at every file; what a crash left is removed.

    :param open_stem: number of the open pass's file, which is left alone.
    :param inspected_max: newest files whose tables are read.
    :raises StorageError: the directory cannot be read.
    """
    found = FoundUndo()
    names = [each for each in store.list(DIRECTORY) if each.partition(".")[0] != open_stem]
    for name in names:
        if name.endswith(OPEN_SUFFIX):
            store.unlink(f"{DIRECTORY}/{name}")  # Its pass never began, or was undone.
    names = [each for each in names if each.endswith(SUFFIX)]
    for at, name in enumerate(names):
        path = f"{DIRECTORY}/{name}"
        file = store.open(path)
        try:
            is_inspected = at >= len(names) - inspected_max
            info = None if is_inspected else glance(file, path)
            if info is None:
                info = inspect(file, path)
            elif not info.is_gap:
                found.unseen.append(path)
            found.passes.append(info)
        except IntegrityError as error:
            found.damaged[path] = error
        finally:
            file.close()
    found.next_number = number_of(names[-1]) + 1 if names else 1
    _drop_merged(store, found)
    return found


def glance(file: File, name: str) -> PassInfo | None:
    """What the header says the file is; None when that takes more than its header.

    :raises IntegrityError: its header is damaged.
    """
    info, _, _, size = read_header(file, name)
    return info if size == info.stored_bytes else None


def inspect(file: File, name: str) -> PassInfo:
    """What the file is; one that is damaged behind its header is a gap.

    :raises IntegrityError: its header is damaged.
    """
    info = read_header(file, name)[0]
    try:
        return UndoReader(file, name).info
    except IntegrityError:
        return replace(info, fault=DAMAGED, raw_bytes=0)


def number_of(name: str) -> int:
    """The number of an undo file."""
    return int(name.removeprefix(f"{DIRECTORY}/").partition(".")[0], 16)


def _drop_merged(store: Store, found: FoundUndo) -> None:
    """Remove the files whose merged one is there, and whole."""
    unseen = set(found.unseen)
    while True:
        covering = merged_over(found.passes)
        unsure = unseen & set(covering.values())
        if not unsure:
            break
        for at, each in enumerate(found.passes):
            if each.name in unsure:
                file = store.open(each.name)
                try:
                    found.passes[at] = inspect(file, each.name)
                finally:
                    file.close()
        unseen -= unsure
    found.passes = [each for each in found.passes if each.name not in covering]
    found.unseen = [each for each in found.unseen if each in unseen and each not in covering]
    for name in sorted(covering):
        store.unlink(name)


def merged_over(passes: Collection[PassInfo] | Sequence[PassInfo]) -> dict[str, str]:
    """Files that a merged one took the place of, and which one: it holds all that they hold.

    One sweep: in the order of where passes begin, the merged one that reaches furthest so far is
    the one to ask. Of two merged ones of the same epochs the one with the later name stays.
    """
    ordered = sorted(passes, key=lambda each: each.name, reverse=True)
    ordered.sort(key=lambda each: (each.from_epoch, -each.to_epoch, not _is_merged(each)))
    found: dict[str, str] = {}
    furthest: PassInfo | None = None
    for each in ordered:
        if furthest is not None and each.to_epoch <= furthest.to_epoch:
            found[each.name] = furthest.name
        elif _is_merged(each):
            furthest = each
    return found


def _is_merged(info: PassInfo) -> bool:
    return MERGED in info.name and not info.is_gap
