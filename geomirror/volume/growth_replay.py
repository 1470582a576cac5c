"""RESIZE records of a recovered log, entered in the indexes again."""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.errors import IntegrityError
from geomirror.volume.dirty_index import DirtyIndex
from geomirror.volume.journal import Journal
from geomirror.volume.record import RecordInfo
from geomirror.volume.volume_change import VolumeChange, decode_changes


@dataclass
class GrowthReplay:
    """Grows indexes as RESIZE records say; `indexes` get those of added volumes."""

    journal: Journal
    indexes: dict[int, DirtyIndex]
    run_blocks_min: int

    def replay(self, record: RecordInfo) -> VolumeChange:
        """Grow the volume's index as the record says. Blocking."""
        payload = self.journal.read(record.address, record.payload_length)
        changes = decode_changes(payload, f"record at LSN {record.lsn}")
        if len(changes) != 1 or changes[0].index != record.volume:
            raise IntegrityError(f"record at LSN {record.lsn} is no growth of a volume")
        index = self.indexes.get(record.volume)
        if index is None:
            index = self.indexes[record.volume] = DirtyIndex(0, self.run_blocks_min)
        if record.offset != index.size_bytes or record.length <= record.offset:
            raise IntegrityError(f"record at LSN {record.lsn} grows another volume")
        index.grow(record.length, record.lsn)
        return changes[0]
