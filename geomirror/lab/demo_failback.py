"""Last act: the old primary comes back, gives up its tail as a branch, and is the primary again.

Nothing is thrown away, and nothing is copied but what differs.
"""

from __future__ import annotations

import asyncio
from typing import Any

from geomirror.errors import WaitTimeoutError
from geomirror.lab.demo_compare import compare, image_of
from geomirror.lab.demo_failover import Parted, write_on
from geomirror.lab.demo_files import copy_files_out
from geomirror.lab.demo_mistake import LOST, are_same, originals
from geomirror.lab.demo_nbd import Writing, judge_export, write_and_flush
from geomirror.lab.demo_stage import POLL_S, WAIT_S_MAX, Stage
from geomirror.limits import BLOCK_BYTES, MIB

REFUSED_S_MAX = 30.0
NEW_S = 1.5
"""New writes before the old primary returns, and after the switchover back."""


class FailbackAct:
    """Plays it once. The second of the stage's nodes is the primary at its begin."""

    def __init__(self, stage: Stage, parted: Parted, old: Writing) -> None:
        """`old` still writes to the old primary."""
        self._stage = stage
        self._parted = parted
        self._old = old
        self._heir = stage.second

    async def play(self) -> None:
        """New writes, return, resolve, switchover, comparison."""
        stage, view = self._stage, self._stage.view
        async with stage.sampler(self._heir), write_on(stage) as writing:
            with view.step(f"new writes at {self._heir.name}; {stage.first.name} follows it"):
                await self._follow()
            with view.step(f"{stage.primary.name} comes back with its tail"):
                await self._come_back()
            with view.step(f"resolve: the history of {self._heir.name} is kept"):
                await self._resolve()
            with view.step(f"switchover back to {stage.primary.name}, under load"):
                await self._switch_back(writing)
        view.forget_lags()
        async with stage.sampler(stage.primary):
            with view.step("new writes, and everything everywhere"):
                await self._write_again()
        with view.step("replication paused, all copies compared and checked"):
            await self._compare()

    async def _follow(self) -> None:
        """The third site goes on with the new primary, by itself."""
        stage, writes = self._stage, self._stage.ledger.write_count
        await asyncio.sleep(NEW_S)
        peer = await stage.until_peer(self._heir, stage.first.name)
        check = stage.report.check
        check("third_site_follows_without_resync", peer["resyncs"] == 0, f"{peer['resyncs']}")
        made = stage.ledger.write_count - writes
        check("new_primary_takes_writes", made > 0, "none")
        stage.view.fact(f"{made:,} new writes; {stage.first.name} needed no resync")

    async def _come_back(self) -> None:
        """At the first contact it has to stop by itself."""
        stage, loop = self._stage, asyncio.get_running_loop()
        primary, first, second = stage.nodes
        begin = loop.time()
        for peer in (first, second):
            await stage.lab.link(primary.name, peer.name).up()
        stage.view.event(f"all links up; {primary.name} is still being written")
        refusal = await self._old.refusal(REFUSED_S_MAX)
        seconds = loop.time() - begin
        found = await self._until_superseded()
        check = stage.report.check
        check("old_primary_stops_at_first_contact", refusal is not None, "it is still written")
        tail = found["superseded"] or {}
        relation = tail.get("relation")
        check("old_primary_knows_that_it_diverged", relation == "diverged", f"{relation}")
        stage.report.figures["old_primary_stop_seconds"] = round(seconds, 3)
        stage.view.fact(f"its writer got an error {seconds:.1f} s after the links were up")
        if relation == "diverged":
            own = tail["own"]
            stage.view.fact(
                f"both left epoch {tail['branch_epoch']}; it has epochs up to {own['epoch']} of "
                f"its own, and waits: nothing is thrown away by guessing"
            )

    async def _until_superseded(self) -> dict[str, Any]:
        stage, loop = self._stage, asyncio.get_running_loop()
        give_up = loop.time() + WAIT_S_MAX
        while not (found := await stage.status(stage.primary)).get("superseded"):
            if loop.time() > give_up:
                raise WaitTimeoutError(f"{stage.primary.name} is {found['state']}, not superseded")
            await asyncio.sleep(POLL_S)
        return found

    async def _resolve(self) -> None:
        stage, loop = self._stage, asyncio.get_running_loop()
        name = stage.primary.name
        begin = loop.time()
        before = int((await stage.peer(self._heir, name)).get("wire_bytes") or 0)
        done = await stage.run(
            self._heir, "resolve", stage.resource, "--keep", self._heir.name, "--yes"
        )
        await stage.wait_applied(self._heir)
        seconds = loop.time() - begin
        peer = await stage.peer(self._heir, name)
        moved = int(peer["wire_bytes"]) - before
        own = self._parted.old.write_count - self._parted.kept_count
        others = stage.ledger.write_count - self._parted.kept_count
        divergence = (own + others) * BLOCK_BYTES
        check = stage.report.check
        check("failback_moves_no_more_than_the_divergence", 0 < moved <= divergence, f"{moved}")
        check("failback_without_resync", peer["resyncs"] == 0, f"{peer['resyncs']} resyncs")
        stage.report.figures |= {
            "failback_seconds": round(seconds, 3),
            "failback_bytes": moved,
            "divergence_bytes": divergence,
        }
        stage.view.fact(
            f"{name} went back to where they parted and follows: {moved / MIB:.1f} MiB crossed the "
            f"link for {divergence / MIB:.1f} MiB of divergence; the volume has "
            f"{stage.image.size_bytes / MIB:.0f} MiB"
        )
        given = [each for each in done["members"] if each.get("branch")]
        check("tail_is_kept_as_a_branch", len(given) == 1, f"{len(given)} branches")
        if given:
            await self._look_at_branch(given[0]["branch"])

    async def _look_at_branch(self, branch: str) -> None:
        """The volume as the old primary last had it."""
        stage, node = self._stage, self._stage.primary
        listed = await stage.run(node, "branch", "list", stage.resource)
        record = next(each for each in listed["branches"] if each["name"] == branch)
        made = await stage.run(node, "branch", "view", stage.resource, branch)
        verdict = await judge_export(made["nbd_uri"], self._parted.old)
        await stage.run(node, "view", "delete", stage.resource, made["name"])
        check = stage.report.check
        missing = verdict.missing_completed
        check("branch_is_a_moment_of_the_history", verdict.is_legal_cut, repr(verdict)[:200])
        check("branch_has_every_write_of_the_tail", not missing, f"{len(missing)} are missing")
        check("branch_is_named_orphan", branch.startswith("orphan-"), branch)
        stage.report.figures["branch_bytes"] = record["stored_bytes"]
        stage.view.fact(
            f"the tail is branch {branch}, {record['stored_bytes'] / MIB:.1f} MiB: a view of it "
            "has every write that the old primary had answered"
        )

    async def _switch_back(self, writing: Writing) -> None:
        """Nothing is lost although writers go on until they are told."""
        stage, loop = self._stage, asyncio.get_running_loop()
        begin = loop.time()
        to = ("switchover", stage.resource, "--to", stage.primary.name)
        done = await stage.run(self._heir, *to)
        stage.uri = done["nbd_uri"]
        await write_and_flush(stage.uri)
        seconds = loop.time() - begin
        refusal = await writing.refusal(REFUSED_S_MAX)
        verdict = await judge_export(stage.uri, stage.ledger)
        lost = verdict.missing_completed
        check = stage.report.check
        check("switchover_lost_no_completed_write", not lost, f"{len(lost)} lost")
        check("switchover_is_a_moment_of_the_history", verdict.is_legal_cut, repr(verdict)[:200])
        check("switchover_tells_writers", refusal is not None, "it is still written")
        stage.report.figures["switchover_seconds"] = round(seconds, 3)
        stage.view.fact(
            f"{done['primary_now']} is the primary again, token {done['token']}; first durable "
            f"write {seconds:.1f} s after the command, nothing lost"
        )

    async def _write_again(self) -> None:
        stage = self._stage
        async with write_on(stage) as writing:
            await asyncio.sleep(NEW_S)
            await writing.stop()
        await stage.wait_applied(stage.primary)

    async def _compare(self) -> None:
        stage = self._stage
        await stage.run(stage.primary, "pause", stage.resource)
        await compare(stage, "in_the_end_")
        files = await copy_files_out(image_of(stage, stage.primary), LOST, stage.directory / "kept")
        is_same = are_same(files, originals())
        stage.report.check("in_the_end_the_restored_files_are_there", is_same, f"{len(files)}")
        names = [name for name in stage.report.checks if name.startswith("in_the_end_")]
        if all(stage.report.checks[name] for name in names):
            stage.view.fact("three sites, one content, byte for byte; e2fsck is clean")
