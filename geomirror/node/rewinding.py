"""Rewinding a primary's storage and taking that back, while nobody serves it. Blocking.

```
 G1 ──p────────────tip            rewind: G2 begins at p, (p, tip] is the branch rewind-G2
       └─ G2 ───x                 rollback: G3 begins at p, (p, x] is a branch too,
       └─ G3 ─ p+1                          and the branch's contents are the next step
```
The last generation's reason is the intent: while it is `returning`, whoever opens the resource goes
on with the return first, so that nobody ever sees a part of it.
"""

from __future__ import annotations

from geomirror.node.branch_desk import REWOUND, rewind_branch
from geomirror.node.branch_intake import check_return, take_in
from geomirror.node.context import NodeContext
from geomirror.volume.branches import BranchRecord
from geomirror.volume.engine import Engine
from geomirror.volume.engine_rollback import chain_through
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
    """Bring in what a branch holds, then forget the branch: the volumes have it."""
    take_in(engine, node, name)
    engine.superblock.chain[-1].reason = RETURNED
    checkpoint = engine.checkpoint_job()
    assert checkpoint is not None
    checkpoint.run()
    engine.complete_checkpoint(checkpoint)
    engine.drop_branch(name)


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
