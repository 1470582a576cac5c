"""Metadata contexts: which there are, which a client means, and what an export says about them.

`base:allocation` is every export's. An export that is a `ContextSource` has more. A query that ends
in a colon is a wildcard, in LIST only: a namespace (`qemu:`), or a namespace and a leaf's beginning
(`qemu:dirty-bitmap:`), as qemu-nbd takes it. SET takes exact names, and ignores what it does not
know. Ids are of one connection: 1 is `base:allocation`, the others follow in the order of granting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from geomirror.errors import GeomirrorError
from geomirror.nbd.constants import ALLOCATION_CONTEXT, ALLOCATION_CONTEXT_ID
from geomirror.nbd.protocol import Export

Answer = Callable[[Sequence[bytes], GeomirrorError | None], None]
"""Takes the extents of each context that was asked for, encoded, or why there are none."""


@runtime_checkable
class ContextSource(Protocol):
    """An export with metadata contexts of its own."""

    def context_names(self) -> list[str]:
        """Exact names that a client may choose now, in the order in which they are listed."""

    def describe(
        self,
        names: Sequence[str],
        offset: int,
        length: int,
        extents_max: int,
        answer: Answer,
    ) -> None:
        """Call `answer` once, now or later, with the extents of each of the names.

        What was completed before the call is in them. A name that was there and is there no more
        has to be answered too, in the way that is safe for its meaning.

        :param extents_max: at most so many each; they may describe a part of the range, but at
            least one byte, and never more than the range.
        """


def available(export: Export) -> list[str]:
    """All contexts of an export."""
    more = export.context_names() if isinstance(export, ContextSource) else []
    return [ALLOCATION_CONTEXT, *more]


def select(names: Sequence[str], queries: Sequence[str], *, is_list: bool) -> list[str]:
    """The contexts that queries mean, in the order of `names`, each once."""
    if not is_list:
        return [name for name in names if name in queries]
    if not queries:
        return list(names)
    wildcards = tuple(query for query in queries if query.endswith(":"))
    return [name for name in names if name in queries or name.startswith(wildcards)]


def with_ids(names: Sequence[str]) -> dict[str, int]:
    """Ids for the contexts of a connection."""
    others = [name for name in names if name != ALLOCATION_CONTEXT]
    ids = {ALLOCATION_CONTEXT: ALLOCATION_CONTEXT_ID} if ALLOCATION_CONTEXT in names else {}
    return ids | {name: ALLOCATION_CONTEXT_ID + 1 + at for at, name in enumerate(others)}
