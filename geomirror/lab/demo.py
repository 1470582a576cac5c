"""The main job, end to end, on one machine: `geomirror demo`.

Three daemons, emulated WAN links, a real file system, and a judgement of every byte, in four acts:
mirrored through faults, a mistake and a look at the time before it, failover, failback.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from geomirror.environment import SeededEntropy
from geomirror.errors import GeomirrorError, RefusedError
from geomirror.lab.demo_failback import FailbackAct
from geomirror.lab.demo_failover import FailoverAct, write_on
from geomirror.lab.demo_image import (
    DemoImage,
    find_tool,
    is_file_system_clean,
    make_file_system,
    prepare,
)
from geomirror.lab.demo_ledger import BlockMaker, Ledger
from geomirror.lab.demo_mirror import MirrorAct
from geomirror.lab.demo_mistake import MistakeAct
from geomirror.lab.demo_report import Report
from geomirror.lab.demo_stage import Stage
from geomirror.lab.demo_summary import show_report
from geomirror.lab.demo_view import View
from geomirror.lab.lab_io import Lab
from geomirror.lab.scenario import LinkSettings
from geomirror.limits import MIB

RESOURCE = "disk"
NODES = (("aws-east", "east-1"), ("gcp-west", "west-1"), ("colo", "colo-1"))
IMAGE_BYTES = 96 * MIB
TIMEOUT_S = 300
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
    for tool in ("mke2fs", "e2fsck", "debugfs"):
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
        """All acts; a step that fails becomes a failed check with its reason."""
        lab = Lab(self._directory, nodes=NODES, default=self._options.link, seed=self._options.seed)
        with View(self._console, self.report) as view:
            try:
                async with asyncio.timeout(TIMEOUT_S):
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
        view.act("A mirror", "one disk at three sites, through flaps and kills")
        with view.step("three nodes, joined by token over mutual TLS"):
            await lab.start()
        stage = await self._make_stage(lab, view)
        mirror = MirrorAct(stage, self._options.seconds)
        try:
            digest = await mirror.play()
        finally:
            self.lags = mirror.lags
        view.act("A mistake", "files deleted everywhere, and the time before it")
        await MistakeAct(stage, digest).play()
        view.act("A lost primary", "cut off in the midst of writing; another site takes over")
        async with write_on(stage) as old:
            parted = await FailoverAct(stage).play()
            view.act("The way back", "the old primary returns, and nothing is thrown away")
            await FailbackAct(stage, parted, old).play()

    async def _make_stage(self, lab: Lab, view: View) -> Stage:
        primary, first, second = lab.nodes
        with view.step("an ext4 image from this machine's Python library"):
            image = await self._build_image()
        with view.step(f"resource {RESOURCE}: primary {primary.name}, two secondaries"):
            await primary.cli(
                *("resource", "create", RESOURCE, "--size", str(image.size_bytes)),
                *("--primary", primary.name),
                *("--secondary", first.name, "--secondary", second.name),
                *("--journal-size", "1G", "--json"),
            )
            status = await primary.cli("status", RESOURCE, "--json")
            uri = str(status["resources"][0]["volumes"][0]["nbd_uri"])
        entropy = SeededEntropy(f"{self._options.seed}/writes")
        ledger = Ledger(image.slot_offsets, self._maker, entropy)
        return Stage(
            lab=lab,
            directory=self._directory,
            resource=RESOURCE,
            primary=primary,
            first=first,
            second=second,
            image=image,
            ledger=ledger,
            view=view,
            report=self.report,
            uri=uri,
        )

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
