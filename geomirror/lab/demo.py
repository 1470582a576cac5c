"""The main job, end to end, on one machine: `geomirror demo`.

Three daemons, emulated WAN links, a real file system, faults, and a judgement of every byte.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from geomirror.environment import SeededEntropy
from geomirror.errors import GeomirrorError, RefusedError
from geomirror.lab.demo_faults import Faults, Stage
from geomirror.lab.demo_image import (
    DemoImage,
    find_tool,
    is_file_system_clean,
    make_file_system,
    prepare,
)
from geomirror.lab.demo_ledger import BlockMaker, Ledger
from geomirror.lab.demo_nbd import Writer, copy_in, copy_out
from geomirror.lab.demo_report import Report, percentile
from geomirror.lab.demo_sampler import Sampler
from geomirror.lab.demo_view import View, show_report
from geomirror.lab.lab_io import Lab, LabNode
from geomirror.lab.scenario import LinkSettings
from geomirror.limits import MIB

RESOURCE = "disk"
NODES = (("aws-east", "east-1"), ("gcp-west", "west-1"), ("colo", "colo-1"))
IMAGE_BYTES = 96 * MIB
WRITE_BYTES_PER_SECOND = 3 * MIB
"""Half of it compresses away: a third of the default link."""
WAIT_TIMEOUT_S = 60
TIMEOUT_S = 240
"""The whole demo: it takes a third of this."""
MARKER = ".geomirror-demo"
"""File that says a directory is ours to remove."""


@dataclass(frozen=True)
class DemoOptions:
    """What the command line can change."""

    report_path: Path
    link: LinkSettings
    seconds: float
    """Time under load."""
    seed: int
    keeps_files: bool


def run_demo(options: DemoOptions, console: Console) -> Report:
    """Run the demo; the report is also written to its path, whatever happened.

    :raises GeomirrorError: something that it needs is missing, or its directory is not its own.
    """
    for tool in ("mke2fs", "e2fsck"):
        find_tool(tool, "e2fsprogs")
    directory = options.report_path.absolute().parent / "lab"
    _claim(directory)
    demo = _Demo(options, directory, console)
    begin = time.monotonic()
    try:
        asyncio.run(demo.run())
    finally:
        demo.report.figures["seconds"] = round(time.monotonic() - begin, 3)
        text = json.dumps(demo.report.to_json(), indent=2)
        options.report_path.write_text(text + "\n", encoding="utf-8")
        if not options.keeps_files and demo.report.passed:
            shutil.rmtree(directory)
    show_report(console, demo.report, demo.lags, str(options.report_path))
    if directory.exists():
        console.print(f"  logs and disks: {directory}\n", highlight=False)
    return demo.report


def _claim(directory: Path) -> None:
    if directory.exists():
        if not (directory / MARKER).exists():
            raise RefusedError(f"{directory} is not from a demo", hint="give another --report path")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, mode=0o700)
    (directory / MARKER).touch()


class _Demo:
    def __init__(self, options: DemoOptions, directory: Path, console: Console) -> None:
        self.report = Report()
        self.lags: dict[str, list[float]] = {}
        self._options = options
        self._directory = directory
        self._console = console
        self._maker = BlockMaker(SeededEntropy(f"{options.seed}/noise"))

    async def run(self) -> None:
        """All steps; a step that fails becomes a failed check with its reason."""
        lab = Lab(self._directory, nodes=NODES, default=self._options.link, seed=self._options.seed)
        with View(self._console) as view:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    with view.step("three nodes, joined by token over mutual TLS"):
                        await lab.start()
                    await self._play(lab, view)
                self.report.check("finished", True)
            except TimeoutError:
                self.report.check("finished", False, f"not done after {TIMEOUT_S} s")
                await self._keep_status(lab)
            except GeomirrorError as error:
                self.report.check("finished", False, str(error))
                await self._keep_status(lab)
            finally:
                with view.step("stop"):
                    await lab.stop()

    async def _play(self, lab: Lab, view: View) -> None:
        primary, first, second = lab.nodes
        with view.step("an ext4 image from this machine's Python library"):
            image = await self._build_image()
        with view.step(f"resource {RESOURCE}: primary {primary.name}, two secondaries"):
            uri = await self._create_resource(lab, image)
        entropy = SeededEntropy(f"{self._options.seed}/writes")
        ledger = Ledger(image.slot_offsets, self._maker, entropy)
        sampler = Sampler(lab, primary, RESOURCE, view)
        stage = Stage(lab, primary, first, second, RESOURCE, ledger, view, self.report)
        writer = Writer(uri, ledger, WRITE_BYTES_PER_SECOND)
        self.lags = sampler.lags
        try:
            async with sampler:
                await self._copy(primary, image, uri, view)
                with view.step("files overwritten while links fail and daemons are killed"):
                    await self._load(writer, stage)
                with view.step("both mirrors have everything"):
                    wait = ("wait", RESOURCE, "--applied", "--timeout", str(WAIT_TIMEOUT_S))
                    await primary.cli(*wait, timeout_s=WAIT_TIMEOUT_S + 20)
                await sampler.sample()
        finally:
            self._note_survivors(writer, ledger)
            self._note_figures(lab, sampler, writer)
        with view.step("replication paused, mirrors compared and checked"):
            await primary.cli("pause", RESOURCE)
            await self._compare(stage)

    async def _keep_status(self, lab: Lab) -> None:
        """Leave beside the logs what every node said when the demo failed."""
        for node in lab.nodes:
            try:
                document = {
                    "status": await node.call("status", {"name": None}),
                    "links": await node.cli("link", "list", "--json"),
                }
            except GeomirrorError as error:
                document = {"error": str(error)}
            text = json.dumps(document, indent=2)
            (self._directory / f"{node.name}.status.json").write_text(text, encoding="utf-8")

    async def _build_image(self) -> DemoImage:
        stage, files, size = await asyncio.to_thread(
            prepare, self._directory, IMAGE_BYTES, self._maker
        )
        path = self._directory / "image.ext4"
        image = await make_file_system(path, stage, IMAGE_BYTES, files, size)
        await asyncio.to_thread(shutil.rmtree, stage)
        is_clean, output = await is_file_system_clean(path)
        if not is_clean:
            raise GeomirrorError(f"the new image is not clean: {output}")
        return image

    async def _create_resource(self, lab: Lab, image: DemoImage) -> str:
        primary, first, second = lab.nodes
        await primary.cli(
            *("resource", "create", RESOURCE, "--size", str(image.size_bytes)),
            *("--primary", primary.name, "--secondary", first.name, "--secondary", second.name),
            *("--journal-size", "1G", "--json"),
        )
        status = await primary.cli("status", RESOURCE, "--json")
        return str(status["resources"][0]["volumes"][0]["nbd_uri"])

    async def _copy(self, primary: LabNode, image: DemoImage, uri: str, view: View) -> None:
        with view.step(f"{image.size_bytes // MIB} MiB image copied in through NBD"):
            begin = time.monotonic()
            client = await copy_in(image.path, uri)
            self.report.figures["copy_seconds"] = round(time.monotonic() - begin, 3)
            view.event(f"{client} wrote {image.file_count} files, {image.content_bytes:,} bytes")
        self.report.figures["image_bytes"] = image.size_bytes
        self.report.figures["image_files"] = image.file_count

    async def _load(self, writer: Writer, stage: Stage) -> None:
        writing = asyncio.create_task(writer.run())
        playing = asyncio.create_task(Faults(stage).play(self._options.seconds))
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

    def _note_survivors(self, writer: Writer, ledger: Ledger) -> None:
        lost = sum(len(verdict.missing_confirmed) for verdict in writer.verdicts)
        completed = sum(len(verdict.missing_completed) for verdict in writer.verdicts)
        broken = sum(not verdict.is_legal_cut for verdict in writer.verdicts)
        check = self.report.check
        check("primary_lost_no_flushed_write", not lost, f"{lost} lost")
        check("primary_lost_no_completed_write", not completed, f"{completed} lost")
        check("primary_was_a_moment_of_the_history", not broken, f"{broken} times broken")
        check("primary_was_killed_under_load", writer.reconnects > 0, "no client noticed")
        self.report.figures |= {
            "writes": ledger.write_count,
            "flushes": ledger.flushes,
            "confirmed_writes": ledger.confirmed_count,
            "lost_confirmed_writes": lost,
            "lost_completed_writes": completed,
        }

    def _note_figures(self, lab: Lab, sampler: Sampler, writer: Writer) -> None:
        lags, resyncs = sampler.all_lags, sum(sampler.resyncs.values())
        kills = sum(node.kills for node in lab.nodes)
        self.report.check("no_resync", resyncs == 0, f"{resyncs} resyncs")
        self.report.check("lag_was_measured", len(lags) > 10, f"{len(lags)} samples")
        self.report.check("faults_happened", sampler.flaps >= 5 and kills >= 2, "too few")
        self.report.figures |= {
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

    async def _compare(self, stage: Stage) -> None:
        primary = await _resource_status(stage.primary)
        self.report.figures["epochs"] = int(primary["position"]["epoch"])
        nodes = (stage.primary, stage.first, stage.second)
        digests = await asyncio.gather(*(self._inspect(stage, node, primary) for node in nodes))
        for node, digest in zip(nodes[1:], digests[1:], strict=True):
            is_equal = digest == digests[0]
            self.report.check(f"mirror_{node.site}_identical", is_equal, "bytes differ")

    async def _inspect(self, stage: Stage, node: LabNode, primary: dict[str, Any]) -> str:
        """Read a node's volume, judge what is in it, and return its SHA-256."""
        name = "primary" if node is stage.primary else f"mirror_{node.site}"
        check = self.report.check
        found = await _resource_status(node)
        path = self._directory / f"read-{node.name}.ext4"
        await copy_out(found["volumes"][0]["nbd_uri"], path)
        again = await _resource_status(node)
        epochs = [document["position"]["epoch"] for document in (primary, found, again)]
        stood_still = len(set(epochs)) == 1
        check(f"{name}_at_the_last_epoch", stood_still, f"primary, before, after: {epochs}")
        image = await asyncio.to_thread(path.read_bytes)
        verdict = stage.ledger.judge_image(memoryview(image))
        missing = verdict.missing_confirmed
        check(f"{name}_has_every_flushed_write", not missing, f"{len(missing)} are missing")
        check(f"{name}_is_a_moment_of_the_history", verdict.is_legal_cut, repr(verdict)[:200])
        is_clean, output = await is_file_system_clean(path)
        check(f"{name}_e2fsck_clean", is_clean, output[-200:])
        return hashlib.sha256(image).hexdigest()


async def _resource_status(node: LabNode) -> dict[str, Any]:
    status = await node.cli("status", RESOURCE, "--json")
    found: dict[str, Any] = status["resources"][0]
    return found
