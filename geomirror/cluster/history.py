"""Comparison of two histories: may one follow the other, and where did they part?

```
 A ──1──2──3──4──5──6        generation A, epochs 1…6
           └─ B ──4──5       generation B begins at (A, 3, H(3)) by a promotion
```
A history is a generation chain and the last epoch on it, with its chain hash. Its *end* within a
generation is where the next generation of the chain begins, else its last epoch. Two histories are
the same as far as their common generations go, up to the lower of both ends in the last common one.

A generation is written by one primary, start after start; each start goes on from all that was ever
shipped (I3), unless the disk was put back to an older state:
```
 A: start p@0 ──── 60 ─ 61 ─ … ─ 100          p seals and ships epochs 1…100
    put back   ─── 60 │ q@60 ─ 61' ─ 62' …    q begins at 60: 61…100 are forgotten
```
So starts part histories like generations, where these alone see one: numbers do not show it once
there are other epochs in the place of those that were lost.

Invariants: equal and ancestor are said only when the hashes at the lower end agree as far as both
are known, and no start that only one side has heard of began below what the other side has; a
change that no epoch holds yet counts as one beyond the last epoch; nothing is inferred from clocks
or tokens. Deliberately not here: who may write (`promotion`), what to do about it (the node).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

EQUAL = "equal"
ANCESTOR = "ancestor"
"""Mine is a part of theirs: it may follow them, nothing of it is lost."""
DESCENDANT = "descendant"
DIVERGED = "diverged"
UNRELATED = "unrelated"
RELATIONS = (EQUAL, ANCESTOR, DESCENDANT, DIVERGED, UNRELATED)
STARTS_MAX = 32
"""Starts that are listed, 150 bytes each in a superblock; one that sealed nothing is not. A copy
that was away for more is compared by generations and hashes alone."""


class ChainLink(Protocol):
    """What is needed of one entry of a generation chain."""

    @property
    def identity(self) -> bytes: ...
    @property
    def token(self) -> int: ...
    @property
    def parent(self) -> bytes: ...
    @property
    def parent_epoch(self) -> int: ...
    @property
    def parent_hash(self) -> bytes: ...


class StartLink(Protocol):
    """What is needed of one start of a primary."""

    @property
    def identity(self) -> bytes: ...
    @property
    def epoch(self) -> int: ...
    @property
    def chain_hash(self) -> bytes: ...


class StartPoint(NamedTuple):
    """A start of a primary, and its last sealed epoch when it began."""

    identity: bytes
    epoch: int
    chain_hash: bytes


class Generation(NamedTuple):
    """One entry of a generation chain."""

    identity: bytes
    token: int
    parent: bytes = b""
    parent_epoch: int = 0
    parent_hash: bytes = b""


@dataclass(frozen=True)
class History:
    """A chain, oldest generation first, and its last durable epoch."""

    generations: tuple[Generation, ...]
    epoch: int
    chain_hash: bytes
    has_unsealed: bool = False
    """Something was written after the last epoch."""
    starts: tuple[StartPoint, ...] = ()
    """The last starts of the primaries that wrote it, oldest first; empty where nobody knows."""

    @property
    def token(self) -> int:
        """The highest fencing token that was seen, 0 before the first contact."""
        return self.generations[-1].token if self.generations else 0

    def reached(self) -> tuple[Generation, ...]:
        """The chain without generations that begin after the last epoch: they were adopted from a
        primary, but nothing of them is here."""
        chain = self.generations
        while len(chain) > 1 and chain[-1].parent_epoch > self.epoch:
            chain = chain[:-1]
        return chain

    def reached_starts(self) -> tuple[StartPoint, ...]:
        """The starts of which something is here."""
        return tuple(each for each in self.starts if each.epoch < self.epoch)


@dataclass(frozen=True)
class Branch:
    """The last point that two histories share; `chain_hash` None: nobody who compared knows it."""

    generation: bytes
    epoch: int
    chain_hash: bytes | None


@dataclass(frozen=True)
class Comparison:
    """Of mine with theirs; `branch` is None when no common point is known."""

    relation: str
    branch: Branch | None = None

    @property
    def may_follow(self) -> bool:
        """Mine may go on with theirs without losing anything."""
        return self.relation in (EQUAL, ANCESTOR)


@dataclass(frozen=True)
class _End:
    """Where a history leaves a generation."""

    epoch: int
    chain_hash: bytes
    goes_on: bool
    """Into another generation, or with changes that no epoch holds."""


def history(
    chain: Sequence[ChainLink],
    epoch: int,
    chain_hash: bytes,
    *,
    has_unsealed: bool = False,
    starts: Sequence[StartLink] = (),
) -> History:
    """A history from a chain as messages or the superblock have it."""
    generations = tuple(
        Generation(e.identity, e.token, e.parent, e.parent_epoch, e.parent_hash) for e in chain
    )
    points = tuple(StartPoint(e.identity, e.epoch, e.chain_hash) for e in starts)
    return History(generations, epoch, chain_hash, has_unsealed, points)


def compare(
    mine: History, theirs: History, hash_at: Callable[[int], bytes | None] | None = None
) -> Comparison:
    """How my history relates to theirs.

    :param hash_at: chain hash of an epoch of the longer history, None where it is not known. The
        relation then holds only as far as numbers tell; who has the hash checks it later.
    """
    if not mine.reached() or not theirs.reached():
        return _with_blank(mine, theirs)
    found = _compare_generations(mine, theirs, hash_at)
    by_starts = _compare_starts(mine, theirs)
    if by_starts is None or by_starts.may_follow or found.relation == UNRELATED:
        return found
    if found.may_follow:
        return by_starts
    # Neither may follow: they part at the earlier point.
    parted, known = by_starts.branch, found.branch
    if parted is None or by_starts.relation != DIVERGED:
        return found
    is_finer = known is None or parted.epoch < known.epoch or found.relation != DIVERGED
    return by_starts if is_finer else found


def _compare_generations(
    mine: History, theirs: History, hash_at: Callable[[int], bytes | None] | None
) -> Comparison:
    my_chain, their_chain = mine.reached(), theirs.reached()
    common = 0
    while common < min(len(my_chain), len(their_chain)):
        if my_chain[common] != their_chain[common]:
            break
        common += 1
    if not common:
        return Comparison(UNRELATED)
    my_end, their_end = _end(mine, my_chain, common), _end(theirs, their_chain, common)
    lower, higher = sorted((my_end, their_end), key=lambda end: end.epoch)
    known = hash_at(lower.epoch) if hash_at is not None else None
    if lower.epoch == higher.epoch:
        known = higher.chain_hash
    if known is not None and known != lower.chain_hash:
        return Comparison(DIVERGED)
    branch = Branch(my_chain[common - 1].identity, lower.epoch, lower.chain_hash)
    return Comparison(_relation(my_end, their_end), branch)


def _compare_starts(mine: History, theirs: History) -> Comparison | None:
    """By the starts of those who wrote them; None where these tell nothing."""
    my_starts, their_starts = mine.reached_starts(), theirs.reached_starts()
    if not my_starts or not theirs.starts:
        return None
    places = {each.identity: at for at, each in enumerate(their_starts)}
    common = next((each for each in reversed(my_starts) if each.identity in places), None)
    if common is not None:
        my_end = _end_of_start(mine, my_starts, my_starts.index(common))
        their_end = _end_of_start(theirs, their_starts, places[common.identity])
    else:
        first = theirs.starts[0]
        if len(theirs.starts) >= STARTS_MAX or first.epoch >= mine.epoch:
            return None  # Their list does not reach back, or all that is here was before it.
        goes_on = theirs.has_unsealed or theirs.epoch > first.epoch
        my_end = _End(my_starts[0].epoch, my_starts[0].chain_hash, goes_on=True)
        their_end = _End(first.epoch, first.chain_hash, goes_on=goes_on)
    lower, higher = sorted((my_end, their_end), key=lambda end: end.epoch)
    if lower.epoch == higher.epoch and lower.chain_hash != higher.chain_hash:
        return Comparison(DIVERGED)
    chain = [each for each in mine.reached() if not each.parent or each.parent_epoch < lower.epoch]
    generation = (chain or mine.reached())[-1].identity
    branch = Branch(generation, lower.epoch, lower.chain_hash)
    return Comparison(_relation(my_end, their_end), branch)


def _end_of_start(side: History, starts: Sequence[StartPoint], at: int) -> _End:
    if at + 1 < len(starts):
        return _End(starts[at + 1].epoch, starts[at + 1].chain_hash, goes_on=True)
    return _End(side.epoch, side.chain_hash, goes_on=side.has_unsealed)


def _with_blank(mine: History, theirs: History) -> Comparison:
    if mine.generations:
        return Comparison(DESCENDANT)
    return Comparison(ANCESTOR if theirs.generations else EQUAL)


def _end(side: History, chain: Sequence[Generation], common: int) -> _End:
    if len(chain) > common:
        following = chain[common]
        return _End(following.parent_epoch, following.parent_hash, goes_on=True)
    return _End(side.epoch, side.chain_hash, goes_on=side.has_unsealed)


def _relation(mine: _End, theirs: _End) -> str:
    """Whoever stops at the branch point is a part of the other."""
    i_go_on = mine.goes_on or mine.epoch > theirs.epoch
    they_go_on = theirs.goes_on or theirs.epoch > mine.epoch
    if i_go_on and they_go_on:
        return DIVERGED
    if i_go_on:
        return DESCENDANT
    return ANCESTOR if they_go_on else EQUAL


def outranks(theirs: Sequence[ChainLink], mine: Sequence[ChainLink]) -> bool:
    """Whether a chain has the higher claim to be written to, so that the other side stops.

    By the fencing token; two promotions that did not know of each other can have the same one:
    then the identities decide, on both sides alike.
    """
    if not theirs:
        return False
    return not mine or _claim(theirs) > _claim(mine)


def _claim(chain: Sequence[ChainLink]) -> tuple[int, bytes]:
    return (chain[-1].token, chain[-1].identity)
