"""Ways to break what becomes of history as it gets older, for `mutations`."""

from __future__ import annotations

from typing import Any

from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_file import UndoWriter
from geomirror.volume.undo_merge import ThinJob
from geomirror.volume.view_index import Layer

Patch = tuple[type | Any, str, Any]


def merge_keeps_newest() -> list[Patch]:
    """Merged undo restores a later content than that of its start."""
    real = ThinJob._copy

    def copy(self: ThinJob, passes: Any, writer: UndoWriter) -> None:
        real(self, list(reversed(passes)), writer)

    return [(ThinJob, "_copy", copy)]


def thinning_forgets_pins() -> list[Patch]:
    """History gets coarser at epochs, too, that a view or a mark needs as they are."""
    real = ThinJob.__init__

    def init(self: ThinJob, store: Any, undo: Any, limits: Any, pinned: Any, *rest: Any) -> None:
        real(self, store, undo, limits, (), *rest)

    return [(ThinJob, "__init__", init), (UndoStore, "pinned_epochs", lambda self: [])]


def places_of_merged_files_mixed_up() -> list[Patch]:
    """A view that is open while passes are merged looks for all they held at one place."""
    real = Layer.moved

    def moved(self: Layer, from_files: Any, to: Layer) -> Layer | None:
        found = real(self, from_files, to)
        if found is None or found is self:
            return found
        places = found.places.copy()
        changed = places != self.places
        places[changed] = places[changed].min()
        return Layer(found.keys, found.counts, places)

    return [(Layer, "moved", moved)]


HISTORY_MUTATIONS = (
    merge_keeps_newest,
    thinning_forgets_pins,
    places_of_merged_files_mixed_up,
)
