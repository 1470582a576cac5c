"""A branch is written into the volumes, as one step, while nobody serves them. Blocking.

```
 fits into memory and journals    p ─▶ p+1: one epoch, which copies are sent like any other
 more than that                   p ─▶ p+1 ─▶ … ─▶ p+n, applied as it comes; then no undo and no
                                  journal leads to a state in between (`engine_one_step`), and
                                  copies at p get the difference by a resync: they hold p until
                                  they have all of it
```
Invariant (I17): nobody sees, goes to, or is sent a part of the branch; a crash leaves the way back
to p open, from where all of it is done again. So no undo after p is given up meanwhile.
Deliberately not here: going back to p before, and what a crash is followed by (`rewinding`).
"""

from __future__ import annotations

from collections.abc import Iterator

from geomirror.errors import RefusedError
from geomirror.limits import BLOCK_BYTES, GIB
from geomirror.node.context import NodeContext
from geomirror.volume.branch_view import BranchView
from geomirror.volume.branches import BranchRecord
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.engine import Engine
from geomirror.volume.epoch_table import KIND_ZERO
from geomirror.volume.journal import Write
from geomirror.volume.record import RecordType
from geomirror.volume.rollback_foresight import TailSize
from geomirror.wan_protocol.sender import BITMAP


def one_epoch_bytes_max(engine: Engine) -> int:
    """Bytes of a branch that come back as one epoch: it has to fit into memory, and into the
    journals of all copies."""
    limits = engine.limits
    entries_bytes = limits.dirty_entries_max // 4 * BLOCK_BYTES
    return min(limits.dirty_bytes_max // 2, engine.journal.bytes_total // 4, entries_bytes)


def return_bytes_max(engine: Engine) -> int:
    """Bytes of a branch that surely come back: a crash in the middle makes another branch of what
    is there by then, and goes back through its undo."""
    branches, limits = engine.branches, engine.limits
    room = max(0, limits.branches_bytes_max - branches.stored_bytes())
    return min(room // 2, limits.rollback_entries_max * BLOCK_BYTES)


def return_refusal(
    engine: Engine, size: TailSize, branch: BranchRecord | None = None, since_bytes: int = 0
) -> RefusedError | None:
    """Why a branch that holds so much cannot be taken back; None: it can.

    :param branch: None: it is not there yet.
    :param since_bytes: of what becomes another branch before.
    """
    limits, name = engine.limits, engine.superblock.name
    if is_one_epoch(engine, size):
        return None
    called = "BRANCH" if branch is None else branch.name
    subject = "the branch" if branch is None else f'branch "{called}"'
    hint = f"geomirror branch view {name} {called}, or branch export {name} {called} FILE"
    changed = size.blocks + size.zero_blocks
    if changed > limits.rollback_entries_max:
        text = f"{changed} blocks, at most {limits.rollback_entries_max} of them come back"
        return RefusedError(f"{subject} holds {text}", hint=hint)
    stored, count = engine.branches.stored_bytes(), len(engine.branches.records())
    needed = size.data_bytes * (2 if branch is None else 1) + since_bytes
    # Beside it: what was written since, and what a crash in the middle leaves.
    count += 3 if branch is None else 2
    if stored + needed > limits.branches_bytes_max or count > limits.branches_max:
        return RefusedError(
            f"{subject} holds {size.data_bytes / GIB:.1f} GiB, and what a crash in the middle "
            f"would leave does not fit beside it: {limits.branches_max} branches, [storage] "
            "branches_bytes_max",
            hint=f'{hint}; or make room: "geomirror branch list {name}"',
        )
    return None


def is_one_epoch(engine: Engine, size: TailSize) -> bool:
    """Whether so much comes back as one epoch."""
    entries = size.blocks + size.zero_runs
    is_small = size.data_bytes <= one_epoch_bytes_max(engine)
    return is_small and entries <= engine.limits.dirty_entries_max // 4


def check_return(engine: Engine, branch: BranchRecord, since_bytes: int = 0) -> None:
    """:raises RefusedError: the branch cannot be taken back; see `return_refusal`. Blocking."""
    refusal = return_refusal(engine, _size_of(engine, branch.name), branch, since_bytes)
    if refusal is not None:
        raise refusal


def take_in(engine: Engine, node: NodeContext, name: str) -> None:
    """Write what a branch holds; sealed on return, and one step with the next checkpoint.

    :raises GeomirrorError: part of it is there: go back to the branch's base.
    """
    size = _size_of(engine, name)
    view = engine.view_branch(name)
    try:
        if is_one_epoch(engine, size):
            for write in _writes(engine, view, engine.limits.record_payload_bytes_max):
                engine.write([write], node.clock.wall_ns())
            engine.seal_all(node.clock.wall_ns())
        else:
            _take_in_steps(engine, node, view)
    finally:
        view.close()


def _take_in_steps(engine: Engine, node: NodeContext, view: BranchView) -> None:
    base = view.record.base_epoch
    base_hash = bytes.fromhex(view.record.base_hash)
    bytes_max = one_epoch_bytes_max(engine) // 2
    limits = engine.limits
    entries_max = limits.dirty_entries_max // 8
    engine.undo.kept_after = base
    done = entries = 0
    for write in _writes(engine, view, min(limits.record_payload_bytes_max, bytes_max)):
        if done >= bytes_max or entries >= entries_max:
            _settle(engine, node)
            done = entries = 0
        engine.write([write], node.clock.wall_ns())
        blocks = -(-write[3] // BLOCK_BYTES)
        if write[4] is None:
            entries += min(blocks, limits.zero_run_blocks_min)
        else:
            done += write[3]
            entries += blocks
    _settle(engine, node)
    _leave_to_resync(engine, view.record.name, base, base_hash)
    engine.join_steps(base)
    engine.undo.kept_after = None


def _settle(engine: Engine, node: NodeContext) -> None:
    """Bring what was written into the images, durably, so that there is room for more."""
    engine.seal_all(node.clock.wall_ns())
    engine.apply_through(engine.sealed_epoch)
    checkpoint = engine.checkpoint_job()
    if checkpoint is not None:
        checkpoint.run()
        engine.complete_checkpoint(checkpoint)
    engine.release_applied()


def _leave_to_resync(engine: Engine, branch: str, base: int, base_hash: bytes) -> None:
    """Peers lack what the branch holds, as their bitmaps say; in force with the next checkpoint.

    One that is not at the base by then is compared as a whole.
    """
    reader = engine.branches.reader(branch)
    try:
        table = reader.located(0)
    finally:
        reader.close()
    for name, peer in engine.superblock.peers.items():
        bitmap = DirtyBitmap.create(
            engine.store,
            name,
            engine.sizes.now,
            generation=engine.generation,
            epoch=base,
            chain_hash=base_hash,
        )
        if peer.mode == BITMAP:
            bitmap.set_all()  # It lacks more than that.
        bitmap.set_table(table, engine.sealed_epoch)
        job = bitmap.write_job()
        assert job is not None
        job.run()
        peer.mode, peer.bitmap_is_full = BITMAP, False
        peer.bitmap_base, peer.bitmap_base_hash, peer.bitmap_later = base, base_hash.hex(), {}
        peer.bitmap_through = engine.sealed_epoch
        peer.resyncs += 1


def _size_of(engine: Engine, name: str) -> TailSize:
    reader = engine.branches.reader(name)
    try:
        runs = [(count, kind == KIND_ZERO) for _, kind, _, count in reader.entries()]
    finally:
        reader.close()
    zeros = [count for count, is_zero in runs if is_zero]
    blocks = sum(count for count, is_zero in runs if not is_zero)
    return TailSize(blocks, len(zeros), sum(zeros))


def _writes(engine: Engine, view: BranchView, bytes_max: int) -> Iterator[Write]:
    """What brings the branch in, each at most so large."""
    step = bytes_max // BLOCK_BYTES
    for volume, first, count, is_zero in view.runs():
        size = engine.images[volume].size_bytes
        if is_zero:
            length = min(count * BLOCK_BYTES, size - first * BLOCK_BYTES)
            yield int(RecordType.ZERO), volume, first * BLOCK_BYTES, length, None
            continue
        for block in range(first, first + count, step):
            offset = block * BLOCK_BYTES
            length = min(min(step, first + count - block) * BLOCK_BYTES, size - offset)
            yield int(RecordType.WRITE), volume, offset, length, view.read(volume, offset, length)
