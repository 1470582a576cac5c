"""The operator changes the primary: failovers, switchovers, demotions, and what they leave behind.

What is asked for is what the commands ask for (`node.promotion_calls`): a failover is refused while
a primary answers at the heir's end, so there are two primaries only when links or machines failed.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

from geomirror.cluster.verdict import COMPLETE, assess
from geomirror.errors import GeomirrorError, RefusedError
from geomirror.volume.engine import Engine
from geomirror.volume.superblock import HeldRecord
from geomirror.wan_protocol.member_answer import answer_of
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.primary_starts import start_entries
from geomirror.wan_protocol.role_change import lacking
from geomirror.wan_protocol.secondary import CONSISTENT, Secondary
from geomirror.wan_protocol.session import chain_entries, highest_chain, highest_starts
from tests.sim.node import SimNode
from tests.sim.options import NEVER
from tests.sim.oracle import OracleError
from tests.sim.put_back import draw_put_backs
from tests.sim.rewinds import draw_rewinds, is_rewind
from tests.sim.roles import Position
from tests.sim.world import MS, SECOND

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

CALM_FACTOR = 6
TAKE_NS = 200 * MS
"""From the hand over to the heir's promotion, about."""
RESYNC_NS = 15 * SECOND
"""So long is waited for all of a resync."""
TRIES_MAX = 2
"""A tail that cannot be given up so often, with no faults any more, never can."""
LEGITIMATE = ("no state at or before epoch", "nothing is rolled back to before a volume grew")
"""Why that may be: the undo that led back there was given up for want of room, or a resync, a disk
that was put back or a damaged file ended it; or a copy is in a resync over a growth, which its new
primary does not end."""
OTHER_HISTORY = "has another history here"
OTHER_SIZES = "volumes of "


def successions(seed: int) -> dict[str, Any]:
    """Options of a run in which the primary changes: two to five nodes."""
    chance = random.Random(f"{seed}/succession")
    put_back_mean_ns = draw_put_backs(seed)
    return {
        "nodes": chance.choice([2, 3, 3, 4, 5]),
        "succession_mean_ns": int(chance.uniform(2, 8) * SECOND),
        "change_crash_chance": chance.choice([0.0, 0.02, 0.1]),
        # Rewinds of disks that were put back are not looked at.
        "rewind_mean_ns": draw_rewinds(seed) if put_back_mean_ns == NEVER else NEVER,
        "bit_flips": False,
        "put_back_mean_ns": put_back_mean_ns,
        "resynced_heir_chance": chance.choice([0.0, 0.1, 0.3]),
    }


class Succession:
    """Draws and does the changes of one run."""

    def __init__(self, simulation: Simulation, seed: int, mean_ns: int) -> None:
        self._simulation = simulation
        self._world = simulation.world
        self._chance = random.Random(f"{seed}/operator")
        self._mean_ns = mean_ns
        self._is_automatic = self._chance.random() < 0.4
        """`auto_rejoin`"""
        self.counts: dict[str, int] = {}
        self._refusals: dict[str, list[str]] = {}
        """Outranked members → why they could not give up their tail, since faults ended."""
        self._considered: dict[str, tuple[int, HeldRecord | None]] = {}
        """Copies whose resync was seen: their life, and the state that it holds."""
        self._hopeless: set[str] = set()
        """Those that could not, for good."""

    def begin(self) -> None:
        """Schedule what the options ask for."""
        if self._mean_ns != NEVER:
            self._work()

    def _work(self) -> None:
        simulation = self._simulation
        if simulation.faults.is_ending:
            return
        self._world.after(int(self._mean_ns * self._chance.expovariate(1)) + MS, self._work)
        if not simulation.client.is_storm and self._chance.random() * CALM_FACTOR >= 1:
            return
        kinds = [self._fail_over, self._fail_over, self._switch_over, self._demote, self._resolve]
        if simulation.put_back.is_on:
            kinds += [self._choose, self._choose]
        self._chance.choice([*kinds, self._insist])()

    def _count(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1

    # Failover.

    def _fail_over(self) -> None:
        """Something happens to the primary, and a moment later somebody takes its place."""
        heir = self._chance.choice(self._simulation.secondaries)
        self._lose_primary(heir, ["crash", "cut", "isolated", "nothing"])

    def _lose_primary(self, heir: SimNode, causes: list[str]) -> None:
        simulation, chance = self._simulation, self._chance
        primary = simulation.primary
        cause = chance.choice(causes)
        if cause == "crash" and primary.is_alive:
            simulation.crash(primary, is_kill=chance.random() < 0.5)
        elif cause in ("cut", "isolated"):
            for pair in simulation.pairs:
                is_between = primary.name in pair and (cause == "isolated" or heir.name in pair)
                if is_between:
                    self._cut(pair)
        after_ns = self._world.between(10 * MS, 4 * SECOND)
        self._world.after(after_ns, lambda: self._try(heir))

    def resyncs(self, heir: SimNode) -> None:
        """A copy is in a resync. Perhaps readers hold its image from now on, and once everything of
        the resync is durable there, and not applied, the primary is lost."""
        engine, life = heir.engine, heir.life
        is_considered = self._considered.get(heir.name) == (life, engine.held)
        if is_considered or engine.held is None or self._simulation.faults.is_ending:
            return
        self._considered[heir.name] = (life, engine.held)
        if self._chance.random() >= self._simulation.options.resynced_heir_chance:
            return
        until_ns = self._world.now_ns + RESYNC_NS

        def look() -> None:
            is_over = heir.life != life or engine.held is None or self._world.now_ns > until_ns
            if is_over or self._simulation.faults.is_ending:
                return
            if engine.sealed_epoch >= engine.superblock.consistent_from >= 0:
                self._count("resynced heir")
                self._lose_primary(heir, ["crash", "isolated"])
            else:
                self._world.after(TAKE_NS, look)

        self._world.after(MS, lambda: self._simulation.faults.hold(heir))
        self._world.after(TAKE_NS, look)

    def _cut(self, pair: tuple[str, str]) -> None:
        network = self._simulation.network
        network.cut(*pair, self._chance.choice([(True, True), (True, False), (False, True)]))
        long = 40 * SECOND if self._chance.random() < 0.2 else 8 * SECOND
        self._world.after(self._world.between(SECOND, long), lambda: network.heal(*pair))

    def _try(self, heir: SimNode) -> bool:
        """`failover --to HEIR`, given at the heir."""
        if not heir.is_alive or not heir.roles.may_promote() or heir.is_primary:
            return False
        answering = [
            node
            for node in self._simulation.nodes.values()
            if node is not heir and self._answers(heir, node) and isinstance(node.core, Primary)
        ]
        refused = heir.core.put_back_primary if isinstance(heir.core, Secondary) else ""
        if any(node.core.fenced is None and node.name != refused for node in answering):
            return False
        self._check_verdict(heir)
        self._count("failover")
        heir.roles.promote("forced")
        return True

    def _check_verdict(self, heir: SimNode) -> None:
        """O10: what the operator is told of the copy before it is promoted."""
        nodes = self._simulation.nodes.values()
        asked = [n for n in nodes if n is heir or self._answers(heir, n)]
        answers = [answer_of(n.name, n.core) for n in asked if n.core.fenced is None]
        verdict = assess(heir.name, answers)
        epoch = next(each.epoch for each in answers if each.node == heir.name)
        held = heir.oracle.epoch_prefix[epoch]
        is_older = heir.oracle.generation in self._simulation.placing.forked
        if is_older or heir.name in self._simulation.verdicts.restored:
            return  # Somebody does not know that it forgot something.
        if verdict.confirmed.verdict == COMPLETE and held < heir.oracle.flushed:
            raise OracleError(
                f"O10: {heir.name} at epoch {epoch} is said to be complete; it holds {held} "
                f"operations, {heir.oracle.flushed} were confirmed"
            )

    def _answers(self, asking: SimNode, node: SimNode) -> bool:
        link = self._simulation.network.link(asking.name, node.name)
        return node.is_alive and link.is_up and not any(link.is_cut)

    # In order.

    def _switch_over(self) -> None:
        primary = self._simulation.primary
        heir = self._chance.choice(self._simulation.secondaries)
        if self._may_hand_over(primary, [heir.name]):
            self._count("switchover")
            self._world.note(f"{primary.name}: switchover to {heir.name}")
            taken = partial(self._taken, primary, heir)
            primary.roles.hand_over([heir.name], taken, lambda: None)

    def _may_hand_over(self, primary: SimNode, heirs: list[str]) -> bool:
        core = primary.core
        is_free = primary.is_alive and isinstance(core, Primary) and core.fenced is None
        if not is_free or core.is_frozen or primary.roles.stage != "Primary":
            return False
        assert isinstance(core, Primary)
        return bool(heirs) and not lacking(core, heirs, 0)

    def _taken(self, former: SimNode, heir: SimNode, position: Position) -> None:
        """The heir is asked to take over; if it says no, the former primary goes on."""

        def take() -> None:
            engine = heir.engine
            if not heir.is_alive or not self._answers(former, heir):
                return  # Nobody knows whether it took over: the operator looks.
            if heir.roles.may_promote() and _position(engine) == position:
                heir.roles.promote("promoted")
            elif former.is_alive and former.roles.may_promote():
                former.roles.promote("promoted")

        self._world.after(self._world.between(TAKE_NS // 10, TAKE_NS), take)

    def _demote(self) -> None:
        """Nobody is the primary for a while."""
        primary = self._simulation.primary
        core = primary.core
        heirs = [name for name in primary.others if self._may_hand_over(primary, [name])]
        if isinstance(core, Primary) and self._may_hand_over(primary, heirs):
            self._count("demote")
            self._world.note(f"{primary.name}: demoted")
            primary.roles.hand_over(heirs, lambda _: None, lambda: None)

    # Afterwards.

    def _resolve(self) -> None:
        """`resolve --keep` whoever superseded them: tails are given up."""
        for node in self._simulation.nodes.values():
            self._give_up(node)

    def _give_up(self, node: SimNode) -> None:
        if not node.is_alive or not node.roles.is_outranked:
            return
        self._count("resolve")
        try:
            node.roles.follow(gives_up_tail=True)
        except RefusedError as error:
            self._world.note(f"{node.name}: {error}")
            self.refused(node, error)

    def refused(self, node: SimNode, error: GeomirrorError) -> None:
        """It could not give up its tail; while disks fail that is tried again, whatever it says."""
        if self._simulation.faults.is_ending:
            self._refusals.setdefault(node.name, []).append(str(error))

    def outranked(self, node: SimNode) -> None:
        """A member has a tail: where the settings say so, or after a rewind of the history that it
        followed, it comes back by itself."""
        superblock = node.engine.superblock
        own = [each.identity for each in superblock.chain]
        parting = [each for each in superblock.superseded_by if each.identity not in own]
        if self._is_automatic or (parting and is_rewind(parting[0])):
            self._world.after(MS, partial(self._give_up, node))

    def _insist(self) -> None:
        """`resolve --keep` a member that was outranked: its history goes on."""
        nodes = [node for node in self._simulation.nodes.values() if node.is_alive]
        outranked = [node for node in nodes if node.roles.is_outranked]
        if not outranked:
            return
        kept = self._chance.choice(outranked)
        answering = [node for node in nodes if node is kept or self._answers(kept, node)]
        blocks = [node.engine.superblock for node in answering]
        claims = [(chain_entries(each), each.starts) for each in blocks]
        claims += [(highest_chain(each), highest_starts(each)) for each in blocks]
        known = [claim for claim in claims if claim[0]]
        highest, records = max(known, key=lambda found: (found[0][-1].token, found[0][-1].identity))
        core, starts = kept.core, start_entries(records)
        if isinstance(core, Primary):
            kept.call(lambda: core.supersede("", highest, starts))
        else:
            kept.call(lambda: core.hear_chain("", highest, starts))
        if kept.is_alive and kept.roles.may_promote():
            self._count("insist")
            kept.roles.promote("kept")

    def _choose(self) -> None:
        """A copy has what the primary's disk has lost: the operator keeps one of the two."""
        for node in self._simulation.nodes.values():
            core = node.core
            is_free = node.is_alive and not core.is_frozen
            if not is_free or not isinstance(core, Secondary) or not core.put_back_primary:
                continue
            if self._chance.random() < 0.7:
                if self._try(node):
                    self._count("keep what was lost")
                    return
            else:
                self._count("give up what was lost")
                self._simulation.make_anew(node)

    def followed(self, node: SimNode) -> None:
        """It gave up its tail, or had none."""
        self._refusals.pop(node.name, None)

    def _check_hopeless(self, node: SimNode) -> None:
        """A tail that cannot be given up costs a copy: only for want of a state to go back to."""
        reason = self._refusals.pop(node.name)[-1]
        if not any(words in reason for words in LEGITIMATE):
            raise OracleError(f"{node.name} cannot give up its tail: {reason}")
        if node.name in self._hopeless:
            raise OracleError(
                f"{node.name} was made anew, and again cannot give up a tail: {reason}"
            )
        self._hopeless.add(node.name)

    def _make_anew(self) -> None:
        """`remove-secondary`, `add-secondary` for copies that cannot follow."""
        primary = self._simulation.primary.core
        senders = primary.senders if isinstance(primary, Primary) else {}
        for node in self._simulation.nodes.values():
            core = node.core
            refusal = senders[node.name].refusal if node.name in senders else ""
            # First filled over a growth that the history then lost: nothing to go back to.
            is_outgrown = refusal.startswith(OTHER_SIZES) and core.engine.state_epoch is None
            is_refused = OTHER_HISTORY in refusal or is_outgrown
            is_stuck = isinstance(core, Secondary) and is_refused
            is_hopeless = len(self._refusals.get(node.name, ())) > TRIES_MAX
            if is_hopeless:
                self._count("tail given up for good")
                self._check_hopeless(node)
            if is_hopeless or (node.is_alive and is_stuck and not core.is_frozen):
                self._count("anew")
                self._refusals.pop(node.name, None)
                self._simulation.make_anew(node)

    def mend(self) -> None:
        """Faults are over: the operator sees to it that everybody follows one primary."""
        if self._mean_ns == NEVER:
            return
        simulation = self._simulation
        nodes = simulation.nodes.values()
        if not all(node.is_alive for node in nodes):
            return
        self._resolve()
        self._choose()
        self._make_anew()
        if any(isinstance(n.core, Primary) or n.core.is_frozen for n in nodes):
            return
        able = [n for n in nodes if n.roles.may_promote() and not n.is_primary]
        if able:
            self._try(max(able, key=_claim))


def _position(engine: Engine) -> Position:
    return (engine.generation, engine.sealed_epoch)


def _claim(node: SimNode) -> tuple[int, bool, int, str]:
    """Who is to be the primary when nobody is: the newest history, and the most of it."""
    superblock = node.engine.superblock
    chain = superblock.chain
    token = chain[-1].token if chain else 0
    is_whole = superblock.data_state == CONSISTENT
    return (token, is_whole, node.engine.sealed_epoch, node.name)
