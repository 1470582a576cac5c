"""Rewinding a primary's storage and taking that back, while nobody serves it. Blocking.

```
 G1 ──p────────────tip            rewind: G2 begins at p, (p, tip] is the branch rewind-G2
       └─ G2 ───x                 rollback: G3 begins at p, (p, x] is a branch too,
       └─ G3 ─ p+1                          and the branch's contents are epoch p+1
```
The last generation's reason is the intent: while it is `returning`, whoever opens the resource goes
on with the return first, so that nobody ever sees a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from geomirror.errors import RefusedError
from geomirror.limits import BLOCK_BYTES, MIB
from geomirror.node.branch_desk import REWOUND, rewind_branch
from geomirror.node.context import NodeContext
from geomirror.volume.branch_view import BranchView
from geomirror.volume.branches import BranchRecord
from geomirror.volume.engine import Engine
from geomirror.volume.engine_rollback import chain_through
from geomirror.volume.journal import Write
from geomirror.volume.record import RecordType
from geomirror.volume.superblock import GenerationRecord

RETURNING = "returning to "
"""Begins the reason of a generation that takes a branch back in; the branch's name follows."""
RETURNED = "returned"


def rewind(engine: Engine, node: NodeContext, epoch: int) -> BranchRecord | None:
    """Begin a new generation at `epoch`; what came after it becomes a branch, if there was any.

    :raises NotFoundError, RefusedError: nothing changed.
    """
    engine.seal_all(node.clock.wall_ns())
    chain = _chain(engine, node, epoch, REWOUND)
    name = rewind_branch(chain[-1].identity)
    return engine.roll_back(epoch, name, wall_ns=node.clock.wall_ns(), chain=chain).branch


def check_return(engine: Engine, branch: BranchRecord) -> None:
    """Refuse what does not fit in one epoch: others would see states that never were.

    :raises RefusedError: it is too much.
    """
    limits = engine.limits
    view = engine.view_branch(branch.name)
    try:
        blocks = sum(count for _, _, count, is_zero in view.runs() if not is_zero)
        entries = blocks + sum(is_zero for *_, is_zero in view.runs())
    finally:
        view.close()
    size = blocks * BLOCK_BYTES
    size_max = min(limits.dirty_bytes_max // 2, engine.journal.bytes_total // 4)
    if size > size_max or 4 * entries > limits.dirty_entries_max:
        raise RefusedError(
            f'branch "{branch.name}" holds {size // MIB} MiB; at most {size_max // MIB} MiB come '
            "back as one epoch",
            hint=f"geomirror branch export {engine.superblock.name} {branch.name} FILE",
        )


def begin_return(engine: Engine, node: NodeContext, branch: BranchRecord) -> BranchRecord | None:
    """Bring the volumes back to the end of a branch; what came after its base becomes one, too.

    :raises NotFoundError, RefusedError: nothing changed.
    """
    check_return(engine, branch)
    engine.seal_all(node.clock.wall_ns())
    former = engine.generation.hex()
    chain = _chain(engine, node, branch.base_epoch, RETURNING + branch.name)
    job = engine.roll_back(
        branch.base_epoch, f"unrewound-{former[:8]}", wall_ns=node.clock.wall_ns(), chain=chain
    )
    _take_in(engine, node, branch.name)
    return job.branch


def finish_return(engine: Engine, node: NodeContext) -> None:
    """Go on with a return that a crash interrupted, from its beginning; else do nothing."""
    chain = engine.superblock.chain
    if not chain or not chain[-1].reason.startswith(RETURNING):
        return
    base, name = chain[-1].parent_epoch, chain[-1].reason.removeprefix(RETURNING)
    # What was taken in so far is still in the branch.
    job = engine.roll_back(base, "interrupted-return", wall_ns=node.clock.wall_ns(), chain=chain)
    if job.branch is not None:
        engine.drop_branch(job.branch.name)
    _take_in(engine, node, name)


def _take_in(engine: Engine, node: NodeContext, name: str) -> None:
    """Write what a branch holds as one epoch, then forget the branch: the volumes have it."""
    view = engine.view_branch(name)
    try:
        for write in _writes(engine, view):
            engine.write([write], node.clock.wall_ns())
    finally:
        view.close()
    engine.seal_all(node.clock.wall_ns())
    engine.superblock.chain[-1].reason = RETURNED
    checkpoint = engine.checkpoint_job()
    assert checkpoint is not None
    checkpoint.run()
    engine.complete_checkpoint(checkpoint)
    engine.drop_branch(name)


def _writes(engine: Engine, view: BranchView) -> Iterator[Write]:
    step = engine.limits.record_payload_bytes_max // BLOCK_BYTES
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


def _chain(engine: Engine, node: NodeContext, epoch: int, reason: str) -> list[GenerationRecord]:
    """The chain of a new generation that begins after `epoch`."""
    chain = engine.superblock.chain
    kept = chain_through(chain, epoch)
    entry = GenerationRecord(
        node.entropy.token_bytes(16).hex(),
        max(each.token for each in chain) + 1,
        kept[-1].identity,
        epoch,
        engine.rollback_target(epoch).chain_hash.hex(),
        reason,
        node.name,
        node.clock.wall_ns(),
    )
    return [*kept, entry]
