"""Third act: the primary is cut off while it is written, and another site takes over.

Its last writes were not shipped: asynchronous replication loses them, and says so before it does.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from geomirror.errors import WaitTimeoutError
from geomirror.lab.demo_ledger import Ledger, Verdict
from geomirror.lab.demo_nbd import Writing, read_ledger, write_and_flush
from geomirror.lab.demo_stage import POLL_S, WAIT_S_MAX, Stage
from geomirror.limits import MIB

WRITE_BYTES_PER_SECOND = 1 * MIB
ALONE_S = 1.5
"""So long the primary reaches only the site that is promoted, which thus has more than the other;
and so long nobody, at least."""
SETTLE_S = 1.0


@dataclass(frozen=True)
class Parted:
    """Two histories: what the cut-off primary goes on with, and what the new one does."""

    old: Ledger
    new: Ledger
    kept_count: int
    """Writes that both have."""


class FailoverAct:
    """Plays it once. The stage's volume and history are those of the new primary afterwards."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._heir = stage.second

    async def play(self) -> Parted:
        """Cut off, ask, promote. The primary is written all the time, by somebody else."""
        stage, view = self._stage, self._stage.view
        async with stage.sampler(stage.primary):
            with view.step(f"{stage.primary.name} is cut off, and goes on being written"):
                safe = await self._cut_off()
            with view.step(f"failover to {self._heir.name}: what would be lost?"):
                await self._ask()
        with view.step(f"failover to {self._heir.name}"):
            seconds = await self._promote()
            parted = await self._judge(safe, seconds)
        stage.ledger = parted.new
        view.forget_lags()
        return parted

    async def _cut_off(self) -> set[int]:
        """Returns the writes that were at both other sites before."""
        stage, (primary, first, second) = self._stage, self._stage.nodes
        await asyncio.sleep(SETTLE_S)
        moment = stage.ledger.moment
        await stage.wait_applied(primary)
        safe = stage.ledger.completed_before(moment)
        stage.view.event(f"link {primary.name} - {first.name} down, a black hole")
        await stage.lab.link(primary.name, first.name).down()
        await asyncio.sleep(ALONE_S)
        stage.view.event(f"link {primary.name} - {second.name} down: nobody hears {primary.name}")
        await stage.lab.link(primary.name, second.name).down()
        await asyncio.sleep(ALONE_S)
        return safe

    async def _ask(self) -> None:
        """Wait until the primary counts as away, and say what a promotion would lose."""
        stage, heir, loop = self._stage, self._heir, asyncio.get_running_loop()
        give_up = loop.time() + WAIT_S_MAX
        parameters = {"name": stage.resource, "to": heir.name}
        while (await heir.call("failover.assess", parameters))["primary"]["is_reachable"]:
            if loop.time() > give_up:
                raise WaitTimeoutError(f"{heir.name} still hears {stage.primary.name}")
            await asyncio.sleep(POLL_S)
        ask = ("failover", stage.resource, "--to", heir.name, "--dry-run")
        found = await stage.run(heir, *ask)
        # The sentences are the command's own, as an operator sees them.
        text = await heir.cli(*ask)
        for line in str(text).splitlines():
            if line.split(maxsplit=1)[:1] in (["from"], ["lost"], ["but"]):
                stage.view.fact(line.strip())
        check = stage.report.check
        ahead = found["more_advanced"]
        check("failover_goes_to_the_most_advanced", not ahead, f"{ahead} have more")
        loss = found["loss"]
        says_nothing = loss["epochs"] == 0 and loss["is_exact"]
        check("failover_says_that_writes_will_be_lost", not says_nothing, repr(loss))

    async def _promote(self) -> float:
        """Seconds from the command until the new primary has made a write durable."""
        stage, loop = self._stage, asyncio.get_running_loop()
        begin = loop.time()
        to = ("failover", stage.resource, "--to", self._heir.name, "--yes")
        done = await stage.run(self._heir, *to)
        stage.uri = done["nbd_uri"]
        await write_and_flush(stage.uri)
        seconds = loop.time() - begin
        stage.view.fact(
            f"{self._heir.name} is the primary, generation {done['generation'][:8]}, token "
            f"{done['token']}, from epoch {done['epoch']}; first durable write {seconds:.1f} s "
            "after the command"
        )
        return seconds

    async def _judge(self, safe: set[int], seconds: float) -> Parted:
        """What the promoted copy is, by the history of all writes."""
        stage, old = self._stage, self._stage.ledger
        blocks = await read_ledger(stage.uri, old)
        verdict = old.judge(blocks)
        new = old.branch_off(blocks)
        lost = set(verdict.missing_completed)
        check = stage.report.check
        check("failover_copy_is_a_moment_of_the_history", verdict.is_legal_cut, _broken(verdict))
        gone = sorted(lost & safe)
        check("failover_lost_nothing_that_was_shipped", not gone, f"{gone[:5]}")
        check("failover_left_a_tail_behind", bool(lost), "the primary had written nothing more")
        stage.report.figures |= {
            "failover_seconds": round(seconds, 3),
            "failover_lost_writes": len(lost),
        }
        stage.view.fact(
            f"{len(lost):,} answered writes are only at {stage.primary.name}; no others are missing"
        )
        return Parted(old, new, new.write_count)


def _broken(verdict: Verdict) -> str:
    return f"broken {verdict.broken_slots[:3]}, missing {verdict.missing_before[:3]}"


def write_on(stage: Stage) -> Writing:
    """A writer where the volume is writable now, with the history that it has now."""
    return Writing(stage.uri, stage.ledger, WRITE_BYTES_PER_SECOND)
