"""Jobs of the engine that are not a file of their own: reading and checkpointing.

A job is prepared on the event loop, its `run` blocks on any thread and touches only files and
captured values, and the engine completes it on the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from geomirror.volume.dirty_index import IMAGE, ZERO, Piece
from geomirror.volume.image import Image
from geomirror.volume.journal import Pin
from geomirror.volume.marks_file import SaveMarksJob
from geomirror.volume.superblock import Superblock, SuperblockJob
from geomirror.volume.undo import UndoStore
from geomirror.volume.view import View


def read_pieces(
    pieces: Sequence[Piece], read: Callable[[int, int], bytes], image: Image
) -> list[bytes]:
    """The contents of pieces, in order. Blocking.

    :param read: journal contents by (address, length).
    """
    contents: list[bytes] = []
    for offset, length, source in pieces:
        if source == IMAGE:
            contents.append(image.read(offset, length))
        elif source == ZERO:
            contents.append(bytes(length))
        else:
            # Records are never adjacent (headers lie between), so a piece is within one payload.
            contents.append(read(source, length))
    return contents


class ReadJob:
    """Reads one range as it was when the job was made, or newer where it is written meanwhile."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        read: Callable[[int, int], bytes],
        image: Image,
        pin: Pin | None,
    ) -> None:
        self.buffers: list[bytes] = []
        """After `run`: the contents, in order."""
        self._pieces = pieces
        self._read = read
        self._image = image
        self._pin = pin

    def run(self) -> None:
        """Read. :raises StorageError: a device failed."""
        self.buffers = read_pieces(self._pieces, self._read, self._image)

    def release(self) -> None:
        """Let the journal be trimmed again; may be called twice."""
        if self._pin is not None:
            self._pin.release()


class ViewReadJob:
    """Reads one range of a view; the shape of a `ReadJob`."""

    def __init__(self, view: View, volume: int, offset: int, length: int) -> None:
        self.buffers: list[bytes] = []
        """After `run`: the contents."""
        self._view = view
        self._range = (volume, offset, length)

    def run(self) -> None:
        """Read. :raises NotFoundError: the state is gone. :raises StorageError: a device failed."""
        self.buffers = [self._view.read(*self._range)]

    def release(self) -> None:
        """Nothing is held."""


class CheckpointJob:
    """Makes one version of the superblock durable, and the marks that recovery then skips."""

    def __init__(
        self,
        superblock: Superblock,
        write: SuperblockJob,
        undo_to_drop: UndoStore | None,
        marks: SaveMarksJob | None,
    ) -> None:
        self.superblock = superblock
        """The version that is durable after `run`; does not change any more."""
        self.marks = marks
        self._write = write
        self._undo_to_drop = undo_to_drop

    def run(self) -> None:
        """Write. :raises StorageError: the superblock is as before."""
        if self.marks is not None:
            self.marks.run()
        self._write.run()
        # Only now: undo may be what makes an image consistent that the old version speaks of.
        if self._undo_to_drop is not None:
            self._undo_to_drop.drop_due()
