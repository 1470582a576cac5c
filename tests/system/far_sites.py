"""Real daemons in namespaces behind the packet-level emulator, and a client that checks them.

The emulator runs on a loop of its own thread, the writer on another, so that a story is written in
order, blocking, while both go on.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from geomirror.environment import SeededEntropy
from geomirror.lab.demo_ledger import BlockMaker, Ledger, Verdict
from geomirror.lab.namespace_io import Namespace
from geomirror.lab.packet_emulator_io import PacketEmulator, PacketLink
from geomirror.limits import BLOCK_BYTES
from geomirror.nbd.client_io import NbdClient
from tests.system.support import SEED, Site, count_links, create, until, wait_applied

SLOTS = 512
RESOURCE = "pg"

_T = TypeVar("_T")


class FarSite(Site):
    """A node whose network is a namespace. Its sockets in the file system are everybody's."""

    def __init__(self, root: Path, name: str, namespace: Namespace) -> None:
        super().__init__(root, name)
        self.namespace = namespace
        self.endpoint = f"{namespace.ipv4}:{self.port}"

    def command(self, *arguments: str) -> list[str]:
        return self.namespace.command(*super().command(*arguments))

    def entered(self, *arguments: str) -> list[Path]:
        return [self.namespace.path]

    def link(self) -> dict[str, Any]:
        """The link to the one other node, as `link list` shows it."""
        found: dict[str, Any] = self.call("link.list")["links"][0]
        return found

    def downs(self) -> list[str]:
        """Why the link went down, each time."""
        return [event["reason"] for event in self.events("link_down")]


class Loop:
    """An event loop in a thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T], timeout_s: float = 60) -> _T:
        """Run there, and wait here."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def begin(self, work: Coroutine[Any, Any, _T]) -> Any:
        """Run there; the future of it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()


class Wan:
    """The one link between nodes a and b, with blocking calls."""

    def __init__(self, settings: str) -> None:
        self._loop = Loop("packet-emulator")
        self.emulator = PacketEmulator(["a", "b"], {("a", "b"): settings}, seed=1 + SEED)
        try:
            self._loop.run(self.emulator.start())
        except BaseException:
            self._loop.close()
            raise

    @property
    def _link(self) -> PacketLink:
        return self.emulator.link("a", "b")

    def set(self, settings: str, source: str | None = None) -> None:
        """See `PacketLink.set`."""
        self._loop.run(self._link.set(settings, source))

    def down(self, source: str | None = None) -> None:
        """Lose everything, of one direction or of both."""
        self._loop.run(self._link.down(source))

    def up(self, source: str | None = None) -> float:
        """Lose nothing more; the moment of it."""
        self._loop.run(self._link.up(source))
        return time.monotonic()

    def statistics(self, source: str) -> dict[str, Any]:
        """Counters of the direction out of a node."""
        return self._loop.run(self._link.statistics(source))

    def close(self) -> None:
        """Remove the namespaces."""
        try:
            self._loop.run(self.emulator.close())
        finally:
            self._loop.close()


class Writer:
    """A client of the primary that writes numbered blocks at a steady rate, and judges mirrors."""

    def __init__(self, site: Site, *, batch: int = 4, pause_s: float = 0.02) -> None:
        entropy = SeededEntropy(f"far writer {SEED}")
        self._maker = BlockMaker(entropy)
        self.ledger = Ledger([i * BLOCK_BYTES for i in range(SLOTS)], self._maker, entropy)
        self.size_bytes = SLOTS * BLOCK_BYTES
        self.latencies_s: list[float] = []
        """Of every batch and every flush."""
        self.batch, self.pause_s = batch, pause_s
        self._site = site
        self._loop = Loop("writer")
        self._task: Any = None
        self._is_stopping = False
        self._newest_seen = 0

    def fill(self) -> None:
        """The slots as they are before the first write."""
        image = b"".join(self._maker.block(slot, 0) for slot in range(SLOTS))
        self._loop.run(self._site.write(0, image))

    def start(self) -> None:
        """Write until `stop`."""
        self._is_stopping = False
        self._task = self._loop.begin(self._write())

    def stop(self) -> None:
        """End the writing; an error of it is raised here."""
        self._is_stopping = True
        task, self._task = self._task, None
        if task is not None:
            task.result(60)

    def close(self) -> None:
        """End everything."""
        try:
            self.stop()
        finally:
            self._loop.close()

    async def _write(self) -> None:
        async with await NbdClient.connect(self._site.uri()) as client:
            for number in range(1, 1 << 62):
                if self._is_stopping:
                    break
                began = time.monotonic()
                writes = self.ledger.issue(self.batch)
                await asyncio.gather(
                    *(
                        client.write(self.ledger.offsets[write.slot], self.ledger.content(write))
                        for write in writes
                    )
                )
                for write in writes:
                    self.ledger.complete(write)
                self.latencies_s.append(time.monotonic() - began)
                if number % 20 == 0:
                    await self._flush(client)
                await asyncio.sleep(self.pause_s)
            await self._flush(client)

    async def _flush(self, client: NbdClient) -> None:
        began = time.monotonic()
        moment = self.ledger.begin_flush()
        await client.flush()
        self.ledger.confirm(moment)
        self.latencies_s.append(time.monotonic() - began)

    def never_waited(self) -> None:
        """Nothing since the last call was held up by more than this machine's own disk and load."""
        taken, self.latencies_s = sorted(self.latencies_s), []
        assert len(taken) >= 20, f"the writer stood still: {len(taken)} answers"
        late, longest = taken[int(len(taken) * 0.95)], taken[-1]
        # Held up by a link, it would be for as long as an outage lasts, 3 s at least.
        assert late < 0.25 and longest < 2.5, f"95 % within {late:.3f} s, longest {longest:.3f} s"

    def look(self, mirror: Site) -> Verdict:
        """A legal cut of the history at one moment, and not older than the last one (O1, O2)."""
        while True:
            epoch = mirror.status()["position"]["epoch"]
            image = self._loop.run(mirror.read(0, self.size_bytes))
            if mirror.status()["position"]["epoch"] == epoch:
                break
        verdict = self.ledger.judge_image(memoryview(image))
        assert verdict.is_legal_cut, verdict
        assert verdict.sequence_max >= self._newest_seen, "the mirror went back"
        self._newest_seen = verdict.sequence_max
        return verdict

    def drained(self, primary: Site, mirror: Site, timeout_s: float = 60) -> None:
        """Stop; the mirror comes to hold everything, and the primary says so (O1, O7)."""
        self.stop()
        wait_applied(primary, timeout_s=timeout_s)
        verdict = self.look(mirror)
        assert not verdict.missing_completed, verdict
        peer = until(lambda: (p := primary.peer())["lag"]["epochs"] == 0 and p, what="lag zero")
        assert peer["resyncs"] == 0
        assert peer["state"] in ("Stream", "Fold"), peer
        assert peer["disk_state"] == "UpToDate"


def make_far_network(a: FarSite, b: FarSite) -> None:
    """Two running, linked nodes: `east-1` and `west-1`."""
    a.run(
        *("network", "create", "acme", "--site", "east", "--node", "east-1"),
        *("--listen", a.endpoint),
    )
    a.start()
    token = a.run("token", "create", "--site", "west", "--node", "west-1").strip()
    b.run("join", token, "--listen", b.endpoint)
    b.start()
    for site in (a, b):
        until(lambda site=site: count_links(site) == 1, what=f"link of {site.name}")


class Pair:
    """Primary a, its mirror b, the path between them, and a client of a."""

    def __init__(self, root: Path, settings: str) -> None:
        self.wan = Wan(settings)
        self.a, self.b = (FarSite(root, name, self.wan.emulator.node(name)) for name in "ab")
        self.writer = Writer(self.a)
        try:
            make_far_network(self.a, self.b)
            create(self.a, RESOURCE, size=f"{self.writer.size_bytes}")
            self.writer.fill()
            wait_applied(self.a)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave nothing behind."""
        try:
            self.writer.close()
        finally:
            self.a.end()
            self.b.end()
            self.wan.close()

    def received_bytes(self) -> int:
        """Bodies of frames that the mirror got since its daemon started."""
        return int(self.b.peer()["wire_bytes"])

    def seconds_to_data(self, since: float, timeout_s: float = 60) -> float:
        """From `since` until the mirror gets the next frame."""
        before = self.received_bytes()
        while self.received_bytes() == before:
            assert time.monotonic() < since + timeout_s, f"no data; {self.describe()}"
            time.sleep(0.01)
        return time.monotonic() - since

    def describe(self) -> str:
        """For a message about what did not happen."""
        return f"a: {self.a.link()}\nb: {self.b.link()}\n{self.a.peer()}\n{self.a.log()[-3000:]}"
