"""One round with three real daemons on emulated links: a writer, random faults, then the judgement.

Checked all the time: what a flush confirmed, and what was completed, is there after a kill (O4); a
mirror is a legal cut of the history and never goes back (O1, O2); it is never behind what it
reported durable, whatever is killed (O3); what a synchronous flush confirmed is at the mirror that
counts as in sync (O8). At the end lag returns to zero (O7) and all copies are equal, byte for byte.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from pathlib import Path
from typing import Any

from geomirror.environment import SeededEntropy
from geomirror.errors import GeomirrorError
from geomirror.lab.demo_ledger import BlockMaker, Ledger
from geomirror.lab.demo_nbd import Writer, judge_export
from geomirror.lab.lab_io import Lab, LabNode
from geomirror.limits import BLOCK_BYTES, MIB
from geomirror.nbd.client_io import NbdClient
from tests.soak.lab_faults import Faults
from tests.soak.scene import RESOURCE, Broken, Scene

NODES = (("east", "east-1"), ("west", "west-1"), ("colo", "colo-1"))
VOLUME_BYTES = 64 * MIB
SLOTS = 2048
WAIT_S_MAX = 150
"""From the end of the faults to lag zero."""


async def play(directory: Path, seed: int, seconds: float, *, is_broken: bool) -> dict[str, Any]:
    """A whole round: the faults, figures, and why it failed ("" if it did not).

    :param is_broken: change a block of a mirror behind its daemon's back: has to be found.
    """
    chance = random.Random(seed)
    links = ",".join((f"rtt={chance.choice((5, 30, 80, 150))}ms", "jitter=2ms", "rate=100mbit"))
    pairs = {("east-1", "west-1"): links, ("east-1", "colo-1"): links}
    lab = Lab(directory, nodes=NODES, links=pairs, seed=seed)
    maker = BlockMaker(SeededEntropy(f"{seed}/noise"))
    stride = VOLUME_BYTES // SLOTS
    ledger = Ledger([i * stride for i in range(SLOTS)], maker, SeededEntropy(f"{seed}/writes"))
    scene = Scene(lab, chance, ledger)
    result: dict[str, Any] = {"faults": scene.faults, "figures": {}, "why": ""}
    faults = Faults(scene)
    try:
        async with asyncio.timeout(seconds + 2 * WAIT_S_MAX + 120):
            scene.began = asyncio.get_running_loop().time()
            await lab.start()
            uri = await _create(scene, maker)
            rate = chance.choice((1, 2, 4)) * MIB
            writer = Writer(uri, ledger, rate)
            await _run(writer, faults, seconds)
            _judge_survivors(writer)
            await _compare(scene, is_broken=is_broken)
            result["figures"] = {
                "writes": ledger.write_count,
                "flushes": ledger.flushes,
                "reconnects": writer.reconnects,
                "outage_s_max": round(writer.outage_seconds_max, 1),
            }
    except (Broken, GeomirrorError, TimeoutError) as error:
        result["why"] = f"{type(error).__name__}: {error}"
        scene.tell(result["why"])
    finally:
        faults.thaw()
        await lab.stop()
    crashes = [line for node in lab.nodes for line in _crashes(node)]
    if crashes and not result["why"]:
        result["why"] = f"a daemon logged: {crashes[0][:300]}"
    return result


def _crashes(node: LabNode) -> list[str]:
    lines = node.log.read_text(errors="replace").splitlines() if node.log.exists() else []
    return [f"{node.name}: {line}" for line in lines if "exc_type" in line or "Traceback" in line]


async def _create(scene: Scene, maker: BlockMaker) -> str:
    primary, mirrors = scene.primary, scene.mirrors
    await primary.cli(
        *("resource", "create", RESOURCE, "--size", str(VOLUME_BYTES), "--primary", primary.name),
        *(word for node in mirrors for word in ("--secondary", node.name)),
        *("--journal-size", "256M", "--json"),
    )
    resource = None
    while resource is None:
        resource = await scene.resource(primary)
        await asyncio.sleep(0.05)
    uri = str(resource["volumes"][0]["nbd_uri"])
    async with await NbdClient.connect(uri, depth=32) as client:
        offsets = scene.ledger.offsets
        blocks = [(at, maker.block(slot, 0)) for slot, at in enumerate(offsets)]
        await asyncio.gather(*(client.write(at, block) for at, block in blocks))
        await client.flush()
    await primary.cli("wait", RESOURCE, "--applied", "--timeout", "120", timeout_s=140)
    return uri


async def _run(writer: Writer, faults: Any, seconds: float) -> None:
    """Faults while the writer writes; then everything is healed, and the writer stops."""
    writing = asyncio.create_task(writer.run())
    playing = asyncio.create_task(faults.play(seconds))
    try:
        done, _ = await asyncio.wait({writing, playing}, return_when=asyncio.FIRST_COMPLETED)
        if writing in done:
            writing.result()
            raise Broken("the writer ended before it was told to")
        playing.result()
        await faults.heal()
        writer.stop()
        await asyncio.wait_for(writing, WAIT_S_MAX)
    finally:
        for task in (writing, playing):
            task.cancel()
        await asyncio.gather(writing, playing, return_exceptions=True)


def _judge_survivors(writer: Writer) -> None:
    for verdict in writer.verdicts:
        if verdict.missing_confirmed:
            raise Broken(f"O4: confirmed writes are lost: {verdict.missing_confirmed[:5]}")
        if verdict.missing_completed:
            raise Broken(f"O4: completed writes are lost: {verdict.missing_completed[:5]}")
        if not verdict.is_legal_cut:
            raise Broken(f"O1: the primary is no moment of the history: {verdict!r:.300}")


async def _compare(scene: Scene, *, is_broken: bool) -> None:
    """Every copy at one epoch, equal byte for byte, with every write in it."""
    wait = ("wait", RESOURCE, "--applied", "--timeout", str(WAIT_S_MAX))
    try:
        await scene.primary.cli(*wait, timeout_s=WAIT_S_MAX + 20)
    except GeomirrorError as error:
        raise Broken(f"O7: lag does not return to zero: {error}") from error
    if is_broken:
        _change_a_block(scene.mirrors[0])
    found = {node.name: await _digest(scene, node) for node in scene.lab.nodes}
    positions = {epoch for epoch, _ in found.values()}
    if len(positions) != 1:
        raise Broken(f"O1: nothing is written any more, but copies are at {found}")
    if len({digest for _, digest in found.values()}) != 1:
        raise Broken(f"O1: copies at one epoch differ: {found}")
    for node in scene.lab.nodes:
        resource = await scene.resource(node)
        assert resource is not None
        verdict = await judge_export(resource["volumes"][0]["nbd_uri"], scene.ledger)
        if not verdict.is_legal_cut or verdict.missing_completed:
            raise Broken(f"O4: {node.name} lacks writes at the end: {verdict!r:.300}")


async def _digest(scene: Scene, node: LabNode) -> tuple[int, str]:
    resource = await scene.resource(node)
    if resource is None:
        raise Broken(f"{node.name} does not serve the resource at the end")
    digest = hashlib.sha256()
    async with await NbdClient.connect(resource["volumes"][0]["nbd_uri"]) as client:
        async for _, data in client.chunks():
            digest.update(data)
    return int(resource["position"]["epoch"]), digest.hexdigest()[:16]


def _change_a_block(node: LabNode) -> None:
    path = node.data_dir / "resources" / RESOURCE / "volumes" / "0.img"
    with path.open("r+b") as file:
        file.seek(VOLUME_BYTES // 2 + BLOCK_BYTES)
        file.write(b"\xff" * BLOCK_BYTES)
