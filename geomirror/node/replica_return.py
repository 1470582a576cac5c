"""A member hears of a history with a higher token, and comes back to it.

```
 primary    stops at once ─▶ superblock says so ─┐
 secondary  follows nobody with less ────────────┴─▶ no tail: follow ─▶ Secondary
                                                 └─▶ a tail: wait, or when the settings say so:
                                                     save it as a branch, roll back, follow
```
Whoever is in the middle of a resync goes back to the state that it holds first; one that never had
a state has nothing to give up. Where the histories part may not be kept here any more: then it goes
back to the newest state before that, and is sent more.
Deliberately not here: who asks for it (`resolve_calls`, `rejoiner`), which states lead to which
(`cluster.promotion`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from geomirror.cluster.history import ANCESTOR, EQUAL, Comparison, History
from geomirror.cluster.promotion import (
    DIVERGED,
    DRAINING,
    PRIMARY,
    SECONDARY,
    SUPERSEDED,
    is_legal,
)
from geomirror.errors import GeomirrorError, RefusedError, StorageError
from geomirror.node.branch_desk import REWOUND, rewind_branch
from geomirror.node.replica_roles import ReplicaRoles
from geomirror.node.rewinding import RETURNED, RETURNING
from geomirror.node.tail_size import UNKNOWN_TAIL, tail_size
from geomirror.volume.generations import chain_records
from geomirror.volume.superblock import GenerationRecord
from geomirror.wan_protocol.messages import GenerationEntry, StartEntry
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.rejoin_policy import is_automatic
from geomirror.wan_protocol.role_change import (
    check_following,
    claim,
    compare_state,
    compare_with_claim,
    counts_with_resync,
    following,
)
from geomirror.wan_protocol.secondary import Secondary
from geomirror.wan_protocol.session import chain_entries, claim_history, state_history


class ReplicaReturn(ReplicaRoles):
    """The part of `ReplicaService` that comes back."""

    rejoin_refusal: str = ""
    """Why it has not come back, though it may."""
    on_rejoined: Callable[[str], None]
    """Called when it is a secondary again, with the name of its primary."""
    other_since: dict[str, Any] = UNKNOWN_TAIL
    """What the history that outranks this one has since they part, as was last heard."""
    _outranked_by: list[GenerationRecord] | None = None
    _is_broken: bool = False

    # A higher token was heard.

    async def hear(
        self, peer: str, chain: Sequence[GenerationEntry], starts: Sequence[StartEntry] = ()
    ) -> bool:
        """A member knows of this chain; whether this one is outranked now and has a tail.

        :param starts: of that history, as far as they are known.
        :raises GeomirrorError: it is, and cannot write that down.
        """
        core = self._core
        if isinstance(core, Primary):
            core.supersede(peer, chain, starts)
        else:
            core.hear_chain(peer, chain, starts)
        self._runner.drive()
        if self._remembering is not None:
            await asyncio.wait([self._remembering])
        return self.is_outranked

    def _look_at_claims(self) -> None:
        """A higher token was heard, or a member that was outranked is not any more."""
        core, superblock = self._core, self._engine.superblock
        if self._remembering is not None:
            return
        if isinstance(core, Primary):
            if not core.superseded_by:
                return
            known = chain_entries(superblock, superblock.superseded_by)
            is_new = known != core.superseded_by
            if is_new or self._outranked_by != superblock.superseded_by:
                self._outranked_by = chain_records(core.superseded_by)
                self._remembering = asyncio.ensure_future(self._remember(core))
        elif self.stage == DIVERGED and not superblock.superseded_by:
            self._enter("follow")
            self._outranked_by = None
        elif (
            self.stage in (SECONDARY, DIVERGED)
            and superblock.superseded_by
            and superblock.superseded_by != self._outranked_by
        ):
            self._remembering = asyncio.ensure_future(self._diverge())

    async def _remember(self, core: Primary) -> None:
        """Durably, once."""
        try:
            self._enter("higher_token")
            assert core.fenced is not None
            self._held.fail(core.fenced)
            await self._runner.idle()
            starts = core.superseded_starts
            await self._take(claim(self._engine, core.superseded_by, starts))
            await self._settle_claim()
        except GeomirrorError as error:
            self._runner.tell("rejoin_failed", {"error": str(error)})
        finally:
            self._remembering = None

    async def _diverge(self) -> None:
        """The core writes it down with its next checkpoint."""
        try:
            self._enter("higher_token")
            await self._settle_claim()
        finally:
            self._remembering = None

    async def _settle_claim(self) -> None:
        self._outranked_by = list(self._engine.superblock.superseded_by)
        try:
            if self.comparison().relation in (ANCESTOR, EQUAL):
                await self.follow()
            else:
                self.on_outranked()
        except GeomirrorError as error:
            self.rejoin_refusal = str(error)
            self._runner.tell("rejoin_failed", {"error": str(error)})
            self.on_outranked()

    # What there would be to give up.

    @property
    def is_outranked(self) -> bool:
        """It has a tail that a history with a higher token lacks, and accepts nothing."""
        return self.stage in (SUPERSEDED, DIVERGED)

    def comparison(self) -> Comparison:
        """How what this member has relates to the chain that outranks it."""
        return compare_with_claim(self._engine)

    @property
    def rejoins_by_itself(self) -> bool:
        """Whether the settings say so, or what outranks it is a rewind of its own history."""
        parting = self._parting()
        is_rewind = parting is not None and (
            parting.reason in (REWOUND, RETURNED) or parting.reason.startswith(RETURNING)
        )
        return is_rewind or is_automatic(self.definition.settings)

    def _parting(self) -> GenerationRecord | None:
        """The first generation of the higher chain that is not in the own one."""
        superblock = self._engine.superblock
        own = [each.identity for each in superblock.chain]
        return next((g for g in superblock.superseded_by if g.identity not in own), None)

    def history(self) -> dict[str, Any]:
        """What this member has, and of whom it has heard; identities and hashes in hex."""
        superblock, own = self._engine.superblock, state_history(self._engine)
        return {
            "node": self._node.name,
            "role": superblock.role,
            "is_outranked": self.is_outranked,
            "chain": [msgspec.to_builtins(each) for each in superblock.chain],
            "superseded_by": [msgspec.to_builtins(each) for each in superblock.superseded_by],
            "epoch": own.epoch,
            "chain_hash": own.chain_hash.hex(),
            "has_unsealed": own.has_unsealed,
            "starts": msgspec.to_builtins(superblock.starts),
            "superseded_starts": msgspec.to_builtins(superblock.superseded_starts),
        }

    def tail_beyond(self, other: History) -> dict[str, Any]:
        """What this member has that another history has not."""
        engine, own = self._engine, state_history(self._engine)
        found, chain = compare_state(engine, other), engine.superblock.chain
        parted = None if found.branch is None else found.branch.epoch
        return {
            "relation": found.relation,
            "branch_epoch": parted,
            "own": {
                "node": self._node.name,
                "generation": engine.generation.hex(),
                "token": chain[-1].token if chain else 0,
                "epoch": own.epoch,
                "has_unsealed": own.has_unsealed,
                "is_primary": self.stage in (PRIMARY, DRAINING),
                **tail_size(engine, parted),
            },
        }

    def since(self, epoch: int) -> dict[str, Any]:
        """`epochs`, `seconds`, `bytes` that are here after an epoch."""
        return tail_size(self._engine, epoch)

    def tail(self) -> dict[str, Any]:
        """What an outranked member has that the other history has not."""
        superblock = self._engine.superblock
        last = superblock.superseded_by[-1]
        return {
            **self.tail_beyond(claim_history(superblock)),
            "other": {
                "node": last.by,
                "generation": last.identity,
                "token": last.token,
                **self.other_since,
            },
            "is_automatic": self.rejoins_by_itself,
            "refusal": self.rejoin_refusal,
            "next": f"geomirror resolve {self.definition.name} --keep {last.by}",
        }

    def outranked_reason(self) -> str:
        """What keeps an outranked member from anything else, "" for any other."""
        if not self.is_outranked or not self._engine.superblock.superseded_by:
            return ""
        tail = self.tail()
        own, other = tail["own"], tail["other"]
        text = (
            f'resource "{self.definition.name}" holds token {own["token"]} here, "{other["node"]}" '
            f"holds {other['token']} and lacks epochs that are here"
        )
        if self.rejoin_refusal:
            return f"{text}; it has not come back yet: {self.rejoin_refusal}"
        return f"{text}; {tail['next']}"

    # Coming back.

    async def follow(self, *, gives_up_tail: bool = False) -> str:
        """Become a secondary of the chain that outranks this member; its tail becomes a branch.

        :returns: the name of the branch, "" when there was no tail.
        :raises RefusedError: it has a tail and may not give it up, no common point is known, or
            the tail cannot be saved: everything is as before.
        :raises GeomirrorError: with `must_reopen`: open the resource again, which ends it.
        """
        engine, name = self._engine, self.definition.name
        if not self.is_outranked or not is_legal(self.stage, "rejoin"):
            raise RefusedError(f'"{name}" is {self.stage} at {self._node.name}')
        check_following(engine, gives_up_tail=gives_up_tail)
        by, branch = engine.superblock.superseded_by[-1].by, ""
        is_going_on = counts_with_resync(engine, claim_history(engine.superblock))
        is_held = engine.held is not None and not is_going_on
        self._enter("rejoin")
        try:
            await self._stop_core()
            wall_ns, name = self._node.clock.wall_ns(), self._branch_name()
            kept = await self._take(
                following(
                    engine,
                    self._others(),
                    wall_ns,
                    gives_up_tail=gives_up_tail,
                    branch_name=name,
                )
            )
            branch = kept.name if kept is not None else ""
        except GeomirrorError as error:
            self._enter("failed")
            self._is_broken = engine.must_reopen or isinstance(error, StorageError)
            if not self._is_broken:
                self._begin()
            raise
        self._enter("rejoined")
        self._outranked_by, self.rejoin_refusal = None, ""
        self.other_since = UNKNOWN_TAIL
        self._begin()
        if is_held:
            self._runner.tell("returned", {"epoch": engine.applied_epoch})
        fields = {"epoch": engine.sealed_epoch, "by": by, "branch": branch}
        self._runner.tell("rejoined", fields)
        self.on_rejoined(by)
        return branch

    @property
    def must_reopen(self) -> bool:
        """Something was begun that only opening the resource again ends."""
        return self._is_broken

    def _branch_name(self) -> str:
        """Of the tail, if there is one."""
        parting, own = self._parting(), self._engine.generation.hex()[:8]
        if parting is not None and parting.reason == REWOUND:
            return rewind_branch(parting.identity)  # As it is called at the primary.
        return f"unrewound-{own}" if parting is not None and parting.reason == RETURNED else ""

    def leave(self, error: GeomirrorError) -> None:
        """The resource is about to be opened again: its primary offers a session then."""
        if isinstance(self._core, Secondary):
            self._core.leave(error, self._runner.now_ns())
            self._runner.drive()

    def offer(self, peer: str) -> None:
        """A member has come back to the history here: offer it a session now."""
        core = self._core
        if not isinstance(core, Primary) or peer not in self._links_up:
            return
        sender = core.senders.get(peer)
        if sender is not None and not sender.is_open:
            core.link_up(peer, self._runner.now_ns())
            self._runner.drive()
