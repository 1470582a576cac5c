"""Which path to a peer the next attempt takes, and when a better one than that in use is looked at.

```
 rank 0 alone ──all refused, or FALLBACK_NS without a link──▶ ranks 0 and 1 in turn ──▶ … all ranks
 in use at rank r > 0 ──PROBE_NS, doubling──▶ an attempt at a better path, beside the link
```
Better ranks have a head start, so a path through other parties is taken only where the direct one
does not come up; the next outage begins with the ranks that were needed last time. A probe that
succeeds becomes a set of connections; `link` moves to it while the old one still works. A move that
did not last keeps its long pause, so that a path that flaps is not followed at each flap.
Deliberately not here: what a rank is (`tunnel.link_path`), and the pace of attempts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from geomirror.environment import MS, SECOND, Entropy

FALLBACK_NS = 800 * MS
"""Head start of each rank: three of them and a handshake over a long path are within 5 s."""
PROBE_NS = 5 * SECOND
PROBE_NS_MAX = 120 * SECOND
"""An attempt every two minutes costs nothing; a mended path stays unused no longer than that."""
STABLE_NS = 60 * SECOND
"""A link that lasted so long on a better path has come to stay."""


class PathChoice:
    """The paths to one peer and what is known of each. Times are monotonic ns."""

    def __init__(
        self,
        rank_of: Callable[[str], int],
        entropy: Entropy,
        paths: Sequence[str],
        now_ns: int,
    ) -> None:
        self.rank_of = rank_of
        self._entropy = entropy
        self._paths: list[str] = []
        self._ranks: list[int] = []
        """Of the paths, each once, best first."""
        self._open = 0
        """How many of the ranks may be tried now."""
        self._opened_ns = now_ns
        self._turn = 0
        self._failed: set[str] = set()
        """Paths that failed since the link was lost."""
        self._why: dict[str, str] = {}
        """Why a path was not used, for those that failed last time."""
        self._in_use: int | None = None
        """Rank of the link while it is up."""
        self._in_use_since_ns = 0
        self._probe_pause_ns = PROBE_NS
        self._probe_due_ns = now_ns
        self._probe_turn = 0
        self.set_paths(paths, now_ns)

    @property
    def paths(self) -> list[str]:
        """All of them, best rank first."""
        return self._paths

    @property
    def best_rank(self) -> int:
        """Of all paths; 0 if there are none."""
        return self._ranks[0] if self._ranks else 0

    def set_paths(self, paths: Sequence[str], now_ns: int) -> bool:
        """Use others from now on; whether they are others."""
        found = sorted(paths, key=self.rank_of)
        if found == self._paths:
            return False
        self._paths = found
        self._ranks = sorted({self.rank_of(path) for path in found})
        self._why = {path: why for path, why in self._why.items() if path in found}
        self._turn = 0
        self._begin(1, now_ns)
        self._probe_pause_ns, self._probe_due_ns = PROBE_NS, now_ns
        return True

    # While the link is down.

    def choose(self, now_ns: int) -> str:
        """The path of the next attempt; there must be one."""
        fallback_ns = self.fallback_due_ns()
        if fallback_ns is not None and now_ns >= fallback_ns:
            usable = self._usable()
            for path in usable:
                self._why.setdefault(path, f"{path}: no answer within {FALLBACK_NS // MS} ms")
            self._open, self._opened_ns = self._open + 1, now_ns
            # The new ones at once.
            self._turn = len(usable)
        usable = self._usable()
        path = usable[self._turn % len(usable)]
        self._turn += 1
        return path

    @property
    def open_ranks(self) -> int:
        """How many ranks are tried now."""
        return max(1, self._open)

    def fallback_due_ns(self) -> int | None:
        """When an attempt would take a worse rank than those tried now; None: all are tried."""
        if self._open >= len(self._ranks):
            return None
        is_over = self._failed.issuperset(self._usable())
        return self._opened_ns + (0 if is_over else FALLBACK_NS)

    def failed(self, path: str, reason: str) -> None:
        """An attempt did not come up."""
        self._failed.add(path)
        self._why[path] = reason

    def answered(self, path: str) -> None:
        """A set came up on it: begin with it next time."""
        self._why.pop(path, None)
        usable = self._usable()
        if path in usable:
            self._turn = usable.index(path)

    # While it is up.

    def used(self, rank: int, now_ns: int) -> None:
        """The link is up on a path of this rank."""
        self._in_use, self._in_use_since_ns = rank, now_ns
        if self._better():
            self._probe_due_ns = now_ns + self._jittered(self._probe_pause_ns)

    def lost(self, now_ns: int) -> None:
        """It is not any more. Ranks up to the one that was used may be tried at once."""
        if self._in_use is None:
            return
        needed = sum(rank <= self._in_use for rank in self._ranks)
        is_short = now_ns - self._in_use_since_ns < STABLE_NS
        # What was moved to a moment ago and is gone: the path before it is tried beside it.
        self._begin(max(needed, self._open if is_short else 1, 1), now_ns)
        if not is_short and self._in_use <= self.best_rank:
            self._probe_pause_ns = PROBE_NS
        self._in_use = None

    def probe_due_ns(self) -> int | None:
        """When a better path is to be tried; None while there is no better one."""
        if self._in_use is None or not self._better():
            return None
        return self._probe_due_ns

    def choose_probe(self, now_ns: int) -> str:
        """The better path to try now; the next one waits longer."""
        better = self._better()
        path = better[self._probe_turn % len(better)]
        self._probe_turn += 1
        if self._probe_turn % len(better) == 0:
            self._probe_pause_ns = min(2 * self._probe_pause_ns, PROBE_NS_MAX)
        self._probe_due_ns = now_ns + self._jittered(self._probe_pause_ns)
        return path

    def reason(self) -> str:
        """Why no better path is used; empty while the best rank is."""
        if self._in_use is None:
            return ""
        better = self._better()
        whys = [self._why[path] for path in better if path in self._why]
        if whys or not better:
            return "; ".join(whys)
        return "better paths have not been tried yet"

    def _usable(self) -> list[str]:
        ranks = self._ranks[: self._open]
        return [path for path in self._paths if self.rank_of(path) in ranks]

    def _better(self) -> list[str]:
        if self._in_use is None:
            return []
        return [path for path in self._paths if self.rank_of(path) < self._in_use]

    def _begin(self, ranks: int, now_ns: int) -> None:
        self._open, self._opened_ns = min(ranks, len(self._ranks)), now_ns
        self._failed.clear()

    def _jittered(self, pause_ns: int) -> int:
        return int(pause_ns * self._entropy.uniform(0.8, 1.2))
