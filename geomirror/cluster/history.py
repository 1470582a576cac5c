"""Comparison of two histories: may one follow the other, and where did they part?

```
 A ──1──2──3──4──5──6        generation A, epochs 1…6
           └─ B ──4──5       generation B begins at (A, 3, H(3)) by a promotion
```
A history is a generation chain and the last epoch on it, with its chain hash. Its *end* within a
generation is where the next generation of the chain begins, else its last epoch. Two histories are
the same as far as their common generations go, up to the lower of both ends in the last common one.

Invariants: equal and ancestor are said only when the hashes at the lower end agree as far as both
are known (an old snapshot that was put back has the right numbers and another hash); a change that
no epoch holds yet counts as one beyond the last epoch; nothing is inferred from clocks or tokens.
Deliberately not here: who may write (`promotion`), what to do about it (the node).
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
    chain: Sequence[ChainLink], epoch: int, chain_hash: bytes, *, has_unsealed: bool = False
) -> History:
    """A history from a chain as messages or the superblock have it."""
    generations = tuple(
        Generation(e.identity, e.token, e.parent, e.parent_epoch, e.parent_hash) for e in chain
    )
    return History(generations, epoch, chain_hash, has_unsealed)


def compare(
    mine: History, theirs: History, hash_at: Callable[[int], bytes | None] | None = None
) -> Comparison:
    """How my history relates to theirs.

    :param hash_at: chain hash of an epoch of the longer history, None where it is not known. The
        relation then holds only as far as numbers tell; who has the hash checks it later.
    """
    my_chain, their_chain = mine.reached(), theirs.reached()
    if not my_chain or not their_chain:
        return _with_blank(mine, theirs)
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
