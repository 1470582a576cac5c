"""Of two histories keep one: `resolve`, and what members ask of each other for it.

```
 resolve --keep K  any member ─ask all─▶ histories
   K has the highest token               ─▶ the others give up their tails, as branches
   another has it (K is outranked)       ─▶ K begins a generation with a token above both first
```
Deliberately not here: giving up a tail (`replica_return`), doing so unasked (`rejoiner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from typing import Any

import msgspec

from geomirror.cluster.history import (
    ANCESTOR,
    EQUAL,
    Generation,
    History,
    compare,
    history,
    outranks,
)
from geomirror.errors import GeomirrorError, NotFoundError, RefusedError, UnreachableError
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.hearsay import Hearsay
from geomirror.node.promotion_calls import PromotionCalls
from geomirror.node.rejoiner import Rejoiner
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.volume.superblock import GenerationRecord, StartRecord
from geomirror.wan_protocol.messages import GenerationEntry, StartEntry
from geomirror.wan_protocol.primary_starts import start_entries

ASK_TIMEOUT_S = 10.0
GIVE_UP_TIMEOUT_S = 110.0
"""Saving a tail and rolling back takes as long as it is large; the command waits two minutes."""
KEPT = "kept"
"""Reason of a generation that an operator wanted to go on although another had a higher token."""


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The history that is to go on; identities and hashes in hex."""

    chain: list[GenerationRecord]
    epoch: int
    chain_hash: str
    starts: list[StartRecord] = msgspec.field(default_factory=list)
    """Of its primaries; only to a member whose version knows them."""


class Resolve(Parameters, frozen=True):
    """`resolve`"""

    name: str
    keep: str
    is_dry_run: bool = False


class GiveUp(Parameters, frozen=True):
    """`resolve`, from a member to the others."""

    name: str
    keep: str
    is_dry_run: bool = False
    kept: Kept | None = None
    """None from a member of an older version: the history that has outranked this one."""


class OfMember(Parameters, frozen=True):
    """From one member to another."""

    resource_id: str


class Insist(Parameters, frozen=True, omit_defaults=True):
    """From a member to the one whose history is to go on."""

    resource_id: str
    above: list[GenerationRecord]
    """The chain with the highest claim that anybody who answers knows."""
    starts: list[StartRecord] = msgspec.field(default_factory=list)
    """Of that history; only to a member whose version knows them."""


class Answer(msgspec.Struct, frozen=True):
    """What a member has, and of whom it has heard; with `error` nothing else counts."""

    node: str
    error: str = ""
    role: str = "secondary"
    is_outranked: bool = False
    chain: list[GenerationRecord] = msgspec.field(default_factory=list)
    superseded_by: list[GenerationRecord] = msgspec.field(default_factory=list)
    epoch: int = 0
    chain_hash: str = "00" * 32
    has_unsealed: bool = False
    starts: list[StartRecord] | None = None
    """None from a member of an older version, which must not be told any."""
    superseded_starts: list[StartRecord] = msgspec.field(default_factory=list)


@dataclass
class ResolveCalls:
    """Handlers beside those of `PromotionCalls`."""

    calls: ResourceCalls
    promotion: PromotionCalls
    rejoiner: Rejoiner
    hearsay: Hearsay

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("promotion.resolve", Resolve, self.resolve)
        methods.add("promotion.history", OfMember, self.history, from_peers=True)
        methods.add("promotion.insist", Insist, self.insist, from_peers=True)
        methods.add("promotion.give_up", GiveUp, self.give_up, from_peers=True)
        methods.add("promotion.offer", OfMember, self.offer, from_peers=True)

    @property
    def _self(self) -> str:
        return self.calls.host.context.name

    async def resolve(self, caller: Caller, request: Resolve) -> Result:
        """Of two histories keep that of one node: the others give up their tails, as branches.

        :raises UnreachableError: the node does not answer.
        :raises RefusedError: it follows somebody: it has no history of its own.
        """
        definition = self.calls.store.get(request.name).definition
        if request.keep not in definition.members:
            raise NotFoundError(
                f'node "{request.keep}" has no copy of "{request.name}"',
                hint=f"members are {', '.join(definition.members)}",
            )
        answers = {node: await self._ask(node, definition) for node in definition.members}
        kept = answers[request.keep]
        if kept.error:
            raise UnreachableError(f"{request.keep} does not answer: {kept.error}")
        highest, starts = _highest([a for a in answers.values() if not a.error])
        insists = self._has_to_insist(request, kept, highest)
        taken: Result = {}
        if insists and not request.is_dry_run:
            told = [] if kept.starts is None else starts
            above = Insist(definition.resource_id, highest, told)
            taken = await self._insist_at(request.keep, above)
            kept = await self._ask(request.keep, definition)
        wanted = GiveUp(
            request.name,
            request.keep,
            request.is_dry_run,
            Kept(kept.chain, kept.epoch, kept.chain_hash, kept.starts or []),
        )
        others = [answers[node] for node in definition.members if node != request.keep]
        members = [await self._give_up_at(answer, wanted) for answer in others]
        for member in members:
            if member.get("tail"):
                parted = member["tail"]["branch_epoch"]
                member["kept_since"] = await self.hearsay.ask_since(
                    request.keep, definition.resource_id, parted
                )
        is_changed = insists or any(each.get("tail") for each in members)
        return {
            "name": request.name,
            "keep": request.keep,
            "is_dry_run": request.is_dry_run,
            "insists": insists,
            "token": taken.get("token"),
            "is_resolved": is_changed
            and not any(each.get("error") and each["is_reachable"] for each in members),
            "members": members,
        }

    def _has_to_insist(
        self, request: Resolve, kept: Answer, highest: Sequence[GenerationRecord]
    ) -> bool:
        """Whether the history that is to go on has not the highest token."""
        is_lower = outranks(_generations(highest), _generations(kept.chain))
        if kept.role == "primary":
            return kept.is_outranked or is_lower
        if kept.is_outranked:
            return True
        last = _generations(highest)[-1] if highest else None
        mine = _history_of(kept)
        if (
            last is None
            or not is_lower
            or compare(
                mine, history(_generations(highest), last.parent_epoch, last.parent_hash)
            ).may_follow
        ):
            raise RefusedError(
                f'{request.keep} has no history of "{request.name}" of its own: it is a copy',
                hint=f"geomirror status {request.name}",
            )
        return True

    async def _insist_at(self, node: str, wanted: Insist) -> Result:
        if node == self._self:
            return await self.insist(Caller(), wanted)
        return await self._call(node, "promotion.insist", wanted, GIVE_UP_TIMEOUT_S)

    async def _give_up_at(self, answer: Answer, wanted: GiveUp) -> dict[str, Any]:
        node = answer.node
        if answer.error:
            return {"node": node, "error": answer.error, "is_reachable": False}
        if answer.starts is None and wanted.kept is not None:
            untold = msgspec.structs.replace(wanted.kept, starts=[])
            wanted = msgspec.structs.replace(wanted, kept=untold)
        try:
            if node == self._self:
                found = await self.give_up(Caller(), wanted)
            else:
                found = await self._call(node, "promotion.give_up", wanted, GIVE_UP_TIMEOUT_S)
        except GeomirrorError as error:
            return {"node": node, "error": str(error), "is_reachable": True}
        return {**found, "is_reachable": True}

    # What members are asked.

    async def _ask(self, node: str, definition: ResourceDefinition) -> Answer:
        wanted = OfMember(definition.resource_id)
        try:
            if node == self._self:
                raw = await self.history(Caller(), wanted)
            elif self.calls.is_connected(node):
                raw = await self._call(node, "promotion.history", wanted, ASK_TIMEOUT_S)
            else:
                return Answer(node, "no link")
            answer = msgspec.convert(raw, Answer)
            _history_of(answer)
        except GeomirrorError as error:
            return Answer(node, error.message or "no answer")
        except (msgspec.ValidationError, ValueError):
            return Answer(node, "answers in another way; do both run the same version?")
        return answer

    async def history(self, caller: Caller, request: OfMember) -> Result:
        """What this member has, and of whom it has heard."""
        definition = self.calls.store.asked_by(caller.peer, request.resource_id)
        return self.calls.host.get(definition.name).history()

    async def insist(self, caller: Caller, request: Insist) -> Result:
        """Let the history of this member go on, with a token above all that are known."""
        definition = self.calls.store.asked_by(caller.peer, request.resource_id)
        service = self.calls.host.get(definition.name)
        if request.above:
            starts = _starts(request.starts)
            await service.hear(request.above[-1].by, _entries(request.above), starts)
        if not service.is_outranked:
            raise RefusedError(f'nobody has outranked {self._self} for "{definition.name}"')
        return await self.promotion.take_here(definition, KEPT)

    async def give_up(self, caller: Caller, request: GiveUp) -> Result:
        """This member's part: save what the other history has not, and follow it."""
        definition = self.calls.store.get(request.name).definition
        self.calls.store.asked_by(caller.peer, definition.resource_id)
        service = self.calls.host.get(request.name)
        kept, nothing = request.kept, {"node": self._self, "tail": None, "branch": ""}
        if kept is not None:
            chain, starts = _entries(kept.chain), _starts(kept.starts)
            # Whatever it has by now, it goes on.
            chain_hash = bytes.fromhex(kept.chain_hash)
            other = history(chain, kept.epoch, chain_hash, has_unsealed=True, starts=starts)
            tail = service.tail_beyond(other)
            # While the kept history is written its copies are ahead of what was asked of it before.
            own, newest = tail["own"], kept.chain[-1].identity if kept.chain else ""
            is_copy = own["generation"] == newest and not own["is_primary"]
            if is_copy or tail["relation"] in (EQUAL, ANCESTOR):
                return nothing  # It follows by itself.
            if not request.is_dry_run:
                self.rejoiner.forget(request.name)
                # It may come back by itself now.
                await service.hear(request.keep, chain, starts)
        elif not service.is_outranked:
            return nothing
        else:
            tail = service.tail()
            if tail["other"]["node"] != request.keep:
                raise RefusedError(
                    f'"{request.name}" at {self._self} was superseded by {tail["other"]["node"]}, '
                    f"not by {request.keep}",
                    hint=tail["next"],
                )
        branch = "" if request.is_dry_run else await self.rejoiner.bring_back_now(request.name)
        if not branch and not request.is_dry_run:
            raise RefusedError(
                f'"{request.name}" at {self._self} has heard of no higher token than its own',
                hint=f"geomirror status {request.name}",
            )
        return {"node": self._self, "tail": tail, "branch": branch}

    async def offer(self, caller: Caller, request: OfMember) -> Result:
        """The caller has come back: offer it a session now."""
        definition = self.calls.store.asked_by(caller.peer, request.resource_id)
        if caller.peer is not None:
            self.calls.host.get(definition.name).offer(caller.peer)
        return {"node": self._self}

    async def _call(
        self, node: str, method: str, request: Parameters, timeout_s: float
    ) -> dict[str, Any]:
        return await self.calls.links.call(node, method, msgspec.to_builtins(request), timeout_s)


def _generations(chain: Sequence[GenerationRecord]) -> tuple[Generation, ...]:
    return tuple(
        Generation(
            bytes.fromhex(each.identity),
            each.token,
            bytes.fromhex(each.parent),
            each.parent_epoch,
            bytes.fromhex(each.parent_hash),
        )
        for each in chain
    )


def _entries(chain: Sequence[GenerationRecord]) -> list[GenerationEntry]:
    """As the protocol has them. :raises RefusedError: they are no chain."""
    try:
        return [
            GenerationEntry(*generation, each.reason, each.by, each.wall_ns)
            for generation, each in zip(_generations(chain), chain, strict=True)
        ]
    except ValueError:
        raise RefusedError("a generation chain that cannot be read") from None


def _starts(starts: Sequence[StartRecord]) -> list[StartEntry]:
    """Likewise. :raises RefusedError: they are none."""
    try:
        return start_entries(starts)
    except ValueError:
        raise RefusedError("starts of a primary that cannot be read") from None


def _history_of(answer: Answer) -> History:
    chain_hash = bytes.fromhex(answer.chain_hash)
    unsealed = answer.has_unsealed
    return History(_generations(answer.chain), answer.epoch, chain_hash, unsealed)


_Claim = tuple[list[GenerationRecord], list[StartRecord]]
"""A chain, and the starts of the primaries that wrote its history."""


def _highest(answers: Sequence[Answer]) -> _Claim:
    """The chain with the highest claim that any of them has or has heard of."""

    def by_claim(one: _Claim, other: _Claim) -> int:
        mine, theirs = _generations(one[0]), _generations(other[0])
        return 1 if outranks(mine, theirs) else -1 if outranks(theirs, mine) else 0

    claims = [(a.chain, a.starts or []) for a in answers]
    claims += [(a.superseded_by, a.superseded_starts) for a in answers]
    known = [claim for claim in claims if claim[0]]
    return max(known, key=cmp_to_key(by_claim), default=([], []))
