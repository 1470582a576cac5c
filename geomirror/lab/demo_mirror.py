"""First act: a disk is mirrored to two other sites while links fail and daemons are killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from geomirror.errors import GeomirrorError
from geomirror.lab.demo_compare import compare
from geomirror.lab.demo_faults import Faults
from geomirror.lab.demo_nbd import Writer, copy_in
from geomirror.lab.demo_report import percentile
from geomirror.lab.demo_sampler import Sampler
from geomirror.lab.demo_stage import Stage
from geomirror.limits import MIB

WRITE_BYTES_PER_SECOND = 3 * MIB
"""Half of it compresses away: a third of the default link."""


class MirrorAct:
    """Plays it once."""

    def __init__(self, stage: Stage, seconds: float) -> None:
        """`seconds` is the time under load."""
        self.lags: dict[str, list[float]] = {}
        """Of both mirrors, in seconds."""
        self._stage = stage
        self._seconds = seconds

    async def play(self) -> str:
        """Returns the SHA-256 of the volume at its end; replication is paused then."""
        stage, view = self._stage, self._stage.view
        writer = Writer(stage.uri, stage.ledger, WRITE_BYTES_PER_SECOND)
        sampler = stage.sampler(stage.primary)
        self.lags = sampler.lags
        try:
            async with sampler:
                await self._copy()
                with view.step("files overwritten while links fail and daemons are killed"):
                    await self._load(writer)
                with view.step("both mirrors have everything"):
                    await stage.wait_applied(stage.primary)
                await sampler.sample()
        finally:
            self._note_survivors(writer)
            self._note_figures(sampler, writer)
        with view.step("replication paused, mirrors compared and checked"):
            await stage.run(stage.primary, "pause", stage.resource)
            digest = await compare(stage)
            position = (await stage.status(stage.primary))["position"]
            stage.report.figures["epochs"] = int(position["epoch"])
            view.fact(_equality(stage.report.checks, stage.ledger.write_count))
        return digest

    async def _copy(self) -> None:
        stage, image, figures = self._stage, self._stage.image, self._stage.report.figures
        with stage.view.step(f"{image.size_bytes // MIB} MiB image copied in through NBD"):
            begin = time.monotonic()
            client = await copy_in(image.path, stage.uri)
            figures["copy_seconds"] = round(time.monotonic() - begin, 3)
            text = f"{client} wrote {image.file_count} files, {image.content_bytes:,} bytes"
            stage.view.event(text)
        figures["image_bytes"] = image.size_bytes
        figures["image_files"] = image.file_count

    async def _load(self, writer: Writer) -> None:
        writing = asyncio.create_task(writer.run())
        playing = asyncio.create_task(Faults(self._stage).play(self._seconds))
        try:
            done, _ = await asyncio.wait({writing, playing}, return_when=asyncio.FIRST_COMPLETED)
            if playing in done:
                playing.result()
                writer.stop()
            await writing
            if playing not in done:
                raise GeomirrorError("the writer ended before it was told to")
        finally:
            for task in (writing, playing):
                task.cancel()
            await asyncio.gather(writing, playing, return_exceptions=True)

    def _note_survivors(self, writer: Writer) -> None:
        report, ledger = self._stage.report, self._stage.ledger
        lost = sum(len(verdict.missing_confirmed) for verdict in writer.verdicts)
        completed = sum(len(verdict.missing_completed) for verdict in writer.verdicts)
        broken = sum(not verdict.is_legal_cut for verdict in writer.verdicts)
        check = report.check
        check("primary_lost_no_flushed_write", not lost, f"{lost} lost")
        check("primary_lost_no_completed_write", not completed, f"{completed} lost")
        check("primary_was_a_moment_of_the_history", not broken, f"{broken} times broken")
        check("primary_was_killed_under_load", writer.reconnects > 0, "no client noticed")
        report.figures |= {
            "writes": ledger.write_count,
            "flushes": ledger.flushes,
            "confirmed_writes": ledger.confirmed_count,
            "lost_confirmed_writes": lost,
            "lost_completed_writes": completed,
        }

    def _note_figures(self, sampler: Sampler, writer: Writer) -> None:
        report, lags = self._stage.report, sampler.all_lags
        resyncs = sum(sampler.resyncs.values())
        kills = sum(node.kills for node in self._stage.lab.nodes)
        report.check("no_resync", resyncs == 0, f"{resyncs} resyncs")
        report.check("lag_was_measured", len(lags) > 10, f"{len(lags)} samples")
        report.check("faults_happened", sampler.flaps >= 5 and kills >= 2, "too few")
        report.figures |= {
            "flaps": sampler.flaps,
            "kills": kills,
            "client_reconnects": writer.reconnects,
            "client_outage_seconds_max": round(writer.outage_seconds_max, 3),
            "lag_seconds_p50": round(percentile(lags, 0.50), 3),
            "lag_seconds_p99": round(percentile(lags, 0.99), 3),
            "lag_seconds_max": round(max(lags, default=0.0), 3),
            "logical_bytes": sampler.logical_bytes,
            "wire_bytes": sampler.wire_bytes,
            "link_bytes": sampler.link_bytes,
            "resyncs": resyncs,
        }


def _equality(checks: dict[str, bool], writes: int) -> str:
    names: Sequence[str] = [name for name in checks if name.endswith("_identical")]
    if all(checks[name] for name in names):
        return f"three sites, one content, byte for byte, after {writes:,} writes; e2fsck is clean"
    return "the copies differ: see the checks"
