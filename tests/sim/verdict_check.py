"""O10: what members say of confirmed writes is true, whoever of them is asked.

At any time any subset of the nodes is taken for the survivors, and the verdict on each copy is
computed from what these know. `complete` must mean that every write is there that a flush has ever
answered; `complete_until`, or "until" in any verdict, every one answered before the primary said
the standing of that moment.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from geomirror.cluster.verdict import COMPLETE, MemberAnswer, Verdict, assess
from geomirror.wan_protocol.member_answer import answer_of
from geomirror.wan_protocol.messages import Announce
from geomirror.wan_protocol.secondary import Secondary
from tests.sim.oracle import Oracle, OracleError

if TYPE_CHECKING:
    from tests.sim.node import SimNode


@dataclass
class VerdictCheck:
    """Keeps how much was confirmed when each standing was said."""

    oracle: Oracle
    chance: random.Random
    said: dict[int, int] = field(default_factory=dict)
    """Time of the primary in a standing → operations whose flush had been answered before.

    Clocks step: of standings with the same time the first, with the fewest, may be meant.
    """
    restored: dict[str, int] = field(default_factory=dict)
    """Nodes whose disk is an older state of itself → the epoch they have to be past again."""
    verdicts: dict[str, int] = field(default_factory=dict)
    """How often each was given."""

    def report(self, message: object) -> None:
        """The primary sends this."""
        if isinstance(message, Announce):
            self.said.setdefault(message.standing.wall_ns, self.oracle.flushed)

    def put_back(self, name: str) -> None:
        """A node's disk is an older one now: it cannot know what it forgot."""
        self.restored[name] = self.oracle.sealed_epoch

    def look(self, nodes: Mapping[str, SimNode]) -> None:
        """Ask some of the nodes, and judge every verdict."""
        answers = [self._ask(node) for node in nodes.values()]
        for answer in answers:
            if not answer.is_primary and not answer.error:
                self._judge(answer, assess(answer.node, answers))

    def _ask(self, node: SimNode) -> MemberAnswer:
        is_silent = self.chance.random() < (0.7 if node.is_primary else 0.3)
        is_off = not node.is_alive or node.is_damaged or node.core.fenced is not None
        if is_silent or is_off or self._is_older(node):
            return MemberAnswer(node.name, "away")
        answer = answer_of(node.name, node.core)
        if answer.is_primary and answer.standing is not None:
            self.said.setdefault(answer.standing.wall_ns, self.oracle.flushed)
        return answer

    def _is_older(self, node: SimNode) -> bool:
        epoch = self.restored.get(node.name)
        if epoch is None:
            return False
        core = node.core
        assert isinstance(core, Secondary)
        if core.is_standing_heard and core.engine.sealed_epoch >= epoch:
            del self.restored[node.name]
            return False
        return True

    def _judge(self, answer: MemberAnswer, verdict: Verdict) -> None:
        confirmed = verdict.confirmed
        self.verdicts[confirmed.verdict] = self.verdicts.get(confirmed.verdict, 0) + 1
        if not answer.is_usable:
            assert verdict.refusal
            return
        held = self.oracle.epoch_prefix[answer.epoch]
        if confirmed.verdict == COMPLETE and held < self.oracle.flushed:
            raise OracleError(
                f"O10: {answer.node} at epoch {answer.epoch} is said to be complete; it holds "
                f"{held} operations, {self.oracle.flushed} were confirmed"
            )
        if confirmed.until_wall_ns is None:
            return
        count = self.said[confirmed.until_wall_ns]
        if count > held:
            raise OracleError(
                f"O10: {answer.node} at epoch {answer.epoch} holds {held} operations; until the "
                f"time said {count} were confirmed ({confirmed.verdict})"
            )
        self.oracle.checks += 1
