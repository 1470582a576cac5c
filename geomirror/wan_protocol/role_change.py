"""The steps of a change of role, over an engine that no core runs any more.

```
 promotion  sync, or be at the state that a resync holds ─▶ superblock: primary, new generation
 demotion   settle ─▶ superblock: secondary
 claim      superblock: a higher token was seen
 following  no tail: settle; a tail: roll back, it is a branch ─▶ superblock: secondary, their chain
```
Each is a generator of jobs. `Change` drives it: whoever holds one runs the job that it gives, on
any thread, and asks for the next; a job's error is raised in the step that wanted it.
Invariants: one job runs at a time and nothing else uses the engine; a crash or an error before or
in any job leaves a disk from which opening the resource goes on as one of the two roles.
Deliberately not here: who decides, stopping the core, and what is served meanwhile (the node).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from typing import Generic, TypeVar

from geomirror.cluster.history import ANCESTOR, DIVERGED, EQUAL, Comparison, History, compare
from geomirror.errors import GeomirrorError, RefusedError
from geomirror.volume.branches import BranchRecord
from geomirror.volume.engine import Engine
from geomirror.volume.engine_rollback import RollbackJob
from geomirror.volume.superblock import GenerationRecord
from geomirror.wan_protocol.decisions import Job
from geomirror.wan_protocol.messages import GenerationEntry, StartEntry
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.primary_starts import start_records
from geomirror.wan_protocol.secondary import BLANK
from geomirror.wan_protocol.sender import FOLD, STREAM
from geomirror.wan_protocol.session import (
    chain_entries,
    claim_history,
    my_history,
    state_history,
)

Result = TypeVar("Result")
Steps = Generator[Job, None, Result]


class Call(Generic[Result]):
    """A blocking call as a job."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self.result: Result
        self._function = function

    def run(self) -> None:
        """Blocking."""
        self.result = self._function()


class Change(Generic[Result]):
    """Steps on their way: run `next_job` until there is none, then `result` is there."""

    def __init__(self, steps: Steps[Result]) -> None:
        self.result: Result
        self._steps = steps

    def next_job(self, error: GeomirrorError | None = None) -> Job | None:
        """The next job; None at the end.

        :param error: what the last job raised.
        :raises GeomirrorError: that is the end; what the role is by now, the superblock says.
        """
        try:
            return next(self._steps) if error is None else self._steps.throw(error)
        except StopIteration as end:
            self.result = end.value
            return None


# Bringing things to an end.


def settle(engine: Engine, through_epoch: int | None = None) -> Steps[None]:
    """Make everything durable that was received, and bring it into the images.

    :param through_epoch: at least this, and not much more; None: all of it.
    """
    while engine.is_returning:
        step = engine.return_step_job()
        yield step
        engine.complete_return_step(step)
    while True:
        yield from sync(engine)
        wanted = engine.sealed_epoch if through_epoch is None else through_epoch
        target = engine.half_applied_through or engine.pass_end(max(wanted, engine.applied_epoch))
        grow = engine.grow_job(target) if target > engine.applied_epoch else None
        if grow is not None:
            yield grow
            engine.complete_grow(grow)
        yield from checkpoint(engine)
        if target <= engine.applied_epoch:
            return
        apply = engine.apply_job(target)
        yield apply
        engine.complete_apply(apply)


def sync(engine: Engine) -> Steps[None]:
    """Make durable what is committed."""
    if engine.committed_epoch > engine.sealed_epoch:
        job = engine.sync_job()
        yield job
        engine.complete_sync(job)


def checkpoint(engine: Engine) -> Steps[None]:
    """Make the superblock durable, if there is anything new in it."""
    job = engine.checkpoint_job()
    if job is not None:
        yield job
        engine.complete_checkpoint(job)


def go_back(engine: Engine) -> Steps[None]:
    """Return to the state from before a resync that is under way, all the way.

    :raises RefusedError: a volume has grown since; nothing changed.
    """
    engine.begin_return()
    yield from checkpoint(engine)
    job = engine.return_job()
    yield job
    engine.complete_return()
    yield from checkpoint(engine)


def end_resync(engine: Engine) -> Steps[None]:
    """Bring the images to where a resync of which everything has come is over; close its undo."""
    wanted = engine.superblock.consistent_from
    if engine.applied_epoch < wanted:
        # An epoch that was folded has the number of the last of the fold.
        later = (each.number for each in engine.unapplied_epochs() if each.number >= wanted)
        wanted = next(later, wanted)
    yield from settle(engine, wanted)
    job = engine.close_held_job()
    yield job
    engine.complete_close_held(job)
    engine.marks.became_consistent(engine.applied_epoch)
    yield from checkpoint(engine)


# Changes of the role.


def promotion(
    engine: Engine,
    identity: bytes,
    reason: str,
    by: str,
    wall_ns: int,
    peers: Iterable[str],
) -> Steps[GenerationRecord]:
    """Become the primary of a new generation, which begins at the durable epoch.

    :param reason: `promoted` after a hand over, `forced` otherwise.
    """
    if engine.superblock.role == "primary":
        # One that was outranked may have writes that no epoch holds.
        yield Call(partial(engine.seal_all, wall_ns))
        yield from settle(engine)
    yield from sync(engine)
    if engine.has_all_of_resync:
        yield from end_resync(engine)
    if engine.held is not None:
        engine.take_held()
    elif engine.has_growth_to_apply:
        yield from settle(engine)
    generation = engine.next_generation(identity, reason, by, wall_ns)
    job = engine.promote(generation, peers)
    yield job
    engine.complete_checkpoint(job)
    return generation


def demotion(engine: Engine, peers: Iterable[str]) -> Steps[None]:
    """Become a secondary; everything is sealed."""
    yield from settle(engine)
    job = engine.demote(peers)
    yield job
    engine.complete_checkpoint(job)


def claim(
    engine: Engine, chain: Sequence[GenerationEntry], starts: Sequence[StartEntry]
) -> Steps[None]:
    """Remember durably that a chain with a higher token exists, and the starts of its history."""
    job = engine.supersede(chain, start_records(starts))
    if job is not None:
        yield job
        engine.complete_checkpoint(job)


def following(
    engine: Engine,
    peers: Iterable[str],
    wall_ns: int,
    *,
    gives_up_tail: bool,
    branch_name: str = "",
) -> Steps[BranchRecord | None]:
    """Become a secondary of the chain that outranks this member; its tail becomes a branch.

    :param branch_name: of the tail; "": named by the generation that it is of.
    :returns: the branch that the tail is now, None when there was no tail.
    :raises RefusedError: it has a tail and may not give it up, or no common point is known.
    """
    if counts_with_resync(engine, claim_history(engine.superblock)):
        yield from end_resync(engine)
    found = check_following(engine, gives_up_tail=gives_up_tail)
    chain = chain_entries(engine.superblock, engine.superblock.superseded_by)
    has_tail = found.relation == DIVERGED
    is_held, is_empty = engine.held is not None, engine.state_epoch is None
    if is_held or not (has_tail or is_empty):
        if engine.superblock.role == "primary":
            yield Call(partial(engine.seal_all, wall_ns))
        yield from settle(engine)
    if is_held:
        yield from go_back(engine)
    elif is_empty:
        # Being filled for the first time: there is nothing that could be kept.
        engine.reset_position(engine.generation, 0, bytes(32), data_state=BLANK)
    branch: BranchRecord | None = None
    if has_tail:
        assert found.branch is not None
        target, chain_hash = engine.retreat_point(found.branch.epoch, found.branch.chain_hash)
        roll_back: Call[RollbackJob] = Call(
            partial(
                engine.roll_back,
                target,
                branch_name or f"orphan-{engine.generation.hex()[:8]}",
                wall_ns=wall_ns,
                chain_hash=chain_hash,
                may_shrink=True,
            )
        )
        yield roll_back
        branch = roll_back.result.branch
    job = engine.rejoin(chain, peers)
    yield job
    engine.complete_checkpoint(job)
    return branch


# What is decided by.


def check_following(engine: Engine, *, gives_up_tail: bool) -> Comparison:
    """How this outranked member relates to whom it is to follow.

    :raises RefusedError: it has a tail and may not give it up, or no common point is known.
    """
    found = compare_with_claim(engine)
    has_tail = found.relation == DIVERGED and found.branch is not None
    if found.relation not in (ANCESTOR, EQUAL) and not (has_tail and gives_up_tail):
        name = engine.superblock.name
        raise RefusedError(
            f'"{name}" has a tail of its own here ({found.relation})',
            hint=f"geomirror status {name} shows it",
        )
    return found


def compare_with_claim(engine: Engine) -> Comparison:
    """How what this member has relates to the chain that outranks it."""
    return compare_state(engine, claim_history(engine.superblock))


def compare_state(engine: Engine, theirs: History) -> Comparison:
    """How what this member has relates to another history.

    A copy that has all of a resync counts with it, unless the histories part before the end of
    that, where nothing leads back to: then with the state that it holds.
    """
    mine = my_history(engine) if counts_with_resync(engine, theirs) else state_history(engine)
    return compare(mine, theirs)


def counts_with_resync(engine: Engine, theirs: History) -> bool:
    """Whether a copy has all of a resync, and the other history does not part from it before the
    end of that."""
    if not engine.has_all_of_resync:
        return False
    found = compare(my_history(engine), theirs)
    parting = -1 if found.branch is None else found.branch.epoch
    is_part = found.relation in (ANCESTOR, EQUAL)
    return is_part or parting >= engine.superblock.consistent_from


def lacking(core: Primary, heirs: Iterable[str], epoch: int) -> list[str]:
    """The heirs that the primary's role cannot be handed over to yet: a consistent image and
    everything up to `epoch` durable is what it takes."""
    found: list[str] = []
    for name in heirs:
        sender = core.senders.get(name)
        is_ready = (
            sender is not None
            and sender.is_open
            and sender.mode in (STREAM, FOLD)
            and sender.data_state == "consistent"
            and sender.durable_epoch >= epoch
        )
        if not is_ready:
            found.append(name)
    return found
