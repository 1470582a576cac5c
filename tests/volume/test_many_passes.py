"""More than ten thousand undo files on a real disk: what each step reads, keeps open and costs.

CPU is bounded generously, by what takes several times as long where something is quadratic.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from geomirror.errors import NotFoundError
from geomirror.limits import BLOCK_BYTES, PRODUCTION
from geomirror.volume.posix_file_io import PosixFile
from geomirror.volume.store_io import DirectoryStore
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_contents import old_contents
from geomirror.volume.undo_file import PassLabel, UndoWriter
from geomirror.volume.undo_merge import ThinJob
from geomirror.volume.undo_tables import PassTables
from geomirror.volume.view import View
from geomirror.volume.view_index import ViewIndex
from tests.volume.full_history import BLOCKS, GENERATION, blocks_of, content_of, labels, write_files

pytestmark = pytest.mark.timeout(600)
MORE_HOURS = 2000
LABELS = labels(MORE_HOURS)
COUNT = len(LABELS)


class CountedStore(DirectoryStore):
    """Counts what is opened, and how many are open at once."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened: Counter[str] = Counter()
        self.open_now = self.open_most = 0

    def open(self, name: str) -> PosixFile:
        file = super().open(name)
        close, self.opened[name] = file.close, self.opened[name] + 1
        self.open_now += 1
        self.open_most = max(self.open_most, self.open_now)

        def closing() -> None:
            self.open_now -= 1
            close()

        file.close = closing  # type: ignore[method-assign]
        return file


class Image:
    """All blocks hold the same."""

    size_bytes = BLOCKS * BLOCK_BYTES

    def read(self, offset: int, length: int) -> bytes:
        return b"i" * length


@contextmanager
def cpu_below(seconds: float) -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < seconds


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    write_files(root, LABELS)
    return root


@pytest.fixture
def store(files: Path, tmp_path: Path) -> Iterator[CountedStore]:
    """The same files under names of their own."""
    root = tmp_path / "resource"
    (root / "undo").mkdir(parents=True)
    for each in os.scandir(files / "undo"):
        os.link(each.path, root / "undo" / each.name)
    made = CountedStore(root)
    yield made
    assert made.open_now == 0
    made.close()


def opened(store: CountedStore) -> UndoStore:
    undo = UndoStore(store, PRODUCTION)
    undo.found(LABELS[-1].to_epoch, 1 << 40)
    return undo


def view_of(store: CountedStore, undo: UndoStore, epoch: int) -> View:
    return View(epoch, {0: Image()}, lambda: undo.history, store.open, PRODUCTION.view_entries_max)


def expected(after: int) -> list[bytes]:
    """Each block before the pass at `after`: the first from it on that has it, or the image."""
    found: dict[int, bytes] = {}
    for at in range(after, COUNT):
        for block in blocks_of(at):
            found.setdefault(block, content_of(at, block))
    return [found.get(block, b"i" * BLOCK_BYTES) for block in range(BLOCKS)]


def read_all(view: View) -> list[bytes]:
    content = view.read(0, 0, BLOCKS * BLOCK_BYTES)
    return [content[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]


def test_a_start_reads_headers_and_jobs_read_the_tables_later(store: CountedStore) -> None:
    assert COUNT > 10_000
    with cpu_below(4):
        undo = opened(store)
    assert len(undo.passes()) == COUNT
    assert set(store.opened.values()) == {1}
    assert store.open_most == 1
    assert undo.has_unseen
    jobs = 0
    while undo.has_unseen:
        undo.look_at_tables(512)
        jobs += 1
    assert jobs == -(-(COUNT - PRODUCTION.undo_inspected_max) // 512)
    assert set(store.opened.values()) == {1, 2}
    assert undo.history.horizon(LABELS[-1].to_epoch) == 0
    assert not undo.history.unusable(LABELS[-1].to_epoch)


def damage_table(store: CountedStore, name: str) -> None:
    """In a copy of the file: its other names keep what it was."""
    path = store.root / name
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_damage_that_a_start_does_not_look_for_is_found_by_the_jobs(store: CountedStore) -> None:
    undo = opened(store)
    name = undo.passes()[3000].name
    damage_table(store, name)
    undo = opened(store)
    assert not undo.passes()[3000].is_gap
    job = ThinJob(store, undo, replace(PRODUCTION, undo_levels=((1, 1 << 61), (2, 1 << 62))), ())
    for _ in range(40):
        job.run()
    assert not undo.has_unseen
    (found,) = undo.history.unusable(LABELS[-1].to_epoch)
    assert (found.fault, found.file) == ("damaged", name)
    assert undo.history.horizon(LABELS[-1].to_epoch) == LABELS[3000].to_epoch
    # Its header says so from now on, so that the next start knows it.
    (again,) = opened(store).history.unusable(LABELS[-1].to_epoch)
    assert again == found


def test_a_file_that_was_cut_is_found_by_its_size_at_once(store: CountedStore) -> None:
    path = store.root / opened(store).passes()[100].name
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])
    assert opened(store).passes()[100].is_gap


def test_the_oldest_point_is_opened_in_one_sweep(store: CountedStore) -> None:
    undo = opened(store)
    store.opened.clear()
    with cpu_below(4):
        view = view_of(store, undo, 0)
        view.prepare()
    assert set(store.opened.values()) == {1}
    assert len(store.opened) == COUNT
    assert read_all(view) == expected(0)
    for after in (1, COUNT // 2, COUNT - 1):
        assert read_all(view_of(store, undo, LABELS[after].from_epoch)) == expected(after)
    with pytest.raises(NotFoundError):
        view_of(store, undo, LABELS[5].from_epoch + 1)
    assert store.open_most == 1


def test_an_open_view_reads_merged_files_and_no_others(store: CountedStore) -> None:
    undo = opened(store)
    view = view_of(store, undo, LABELS[10].from_epoch)
    view.prepare()
    job = ThinJob(store, undo, PRODUCTION, ())
    whole = undo.passes()
    for first in (20, 4000, 9000):
        job.merge(whole[first : first + 5])
    undo.write(PassLabel(GENERATION, LABELS[-1].to_epoch, 1 << 40, 1, bytes(32)), fill_nothing)
    merged = [each.name for each in undo.passes() if ".m3." in each.name or ".m1." in each.name]
    store.opened.clear()
    view.prepare()
    assert set(store.opened) == {*merged, undo.passes()[-1].name}
    assert len(store.opened) == 4
    assert read_all(view) == expected(10)


def fill_nothing(writer: UndoWriter) -> None:
    writer.add_zero(0, BLOCKS * 2, 1)


def test_going_back_by_all_of_it_keeps_one_file_open(store: CountedStore) -> None:
    """As a rollback does: the old content of every block, in the order of the blocks."""
    undo = opened(store)

    def read(info: object) -> PassTables:
        name = str(getattr(info, "name", ""))
        file = store.open(name)
        try:
            return PassTables(file, name)
        finally:
            file.close()

    index = ViewIndex(0).extended(undo.history.since(0), read, 1 << 20)
    held: dict[int, bytes] = {}
    with cpu_below(6):
        for part in old_contents(index, store.open):
            assert part.contents is not None
            held.update(zip(part.blocks, part.contents, strict=True))
    assert [held.get(block, b"i" * BLOCK_BYTES) for block in range(BLOCKS)] == expected(0)
    assert store.open_most == 1


@pytest.mark.parametrize(
    "drop",
    [
        lambda undo: undo.drop_all(),
        lambda undo: undo.drop_oldest(COUNT // 2),
        lambda undo: undo.roll_back(LABELS[COUNT // 2].to_epoch),
    ],
    ids=["all", "the older half", "the newer half"],
)
def test_dropping_thousands_takes_one_step_each(
    store: CountedStore, drop: Callable[[UndoStore], None]
) -> None:
    undo = opened(store)
    with cpu_below(3):
        drop(undo)
    names = {each.name for each in undo.passes()}
    assert names == {f"undo/{each}" for each in store.list("undo")}
    assert len(names) in (0, COUNT - COUNT // 2, COUNT // 2 + 1)


def test_a_file_that_cannot_be_removed_is_kept_with_those_after_it(
    store: CountedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = opened(store)
    unlink, names = store.unlink, [each.name for each in undo.passes()]

    def failing(name: str) -> None:
        if name == names[3]:
            raise NotFoundError(name)
        unlink(name)

    monkeypatch.setattr(store, "unlink", failing)
    with pytest.raises(NotFoundError):
        undo.drop_oldest(6)
    assert [each.name for each in undo.passes()] == names[3:]
    monkeypatch.undo()
    undo.drop_oldest(3)
    assert [each.name for each in undo.passes()] == names[6:]


def test_a_full_history_is_thinned_in_milliseconds_a_job(store: CountedStore) -> None:
    """Every quarter of a second a pass, every ten seconds jobs until none has anything to do."""
    undo = opened(store)
    undo.look_at_tables(COUNT)
    undo.drop_oldest(MORE_HOURS)
    before, runs = undo.history.horizon(LABELS[-1].to_epoch), 0
    epoch, wall_ns = LABELS[-1].to_epoch, LABELS[-1].wall_ns
    data = np.arange(3)
    with cpu_below(8):
        for _ in range(4):
            for _ in range(40):
                epoch, wall_ns = epoch + 1, wall_ns + 250_000_000
                label = PassLabel(GENERATION, epoch - 1, epoch, wall_ns, bytes(32))
                undo.write(label, lambda w: w.add_blocks(0, data, b"n" * (3 * BLOCK_BYTES)))
            has_changed = True
            while has_changed:
                job = ThinJob(store, undo, PRODUCTION, ())
                job.run()
                has_changed, runs = job.has_changed, runs + 1
    assert runs > 35, "one a second"
    assert undo.history.horizon(epoch) == before
    assert len(undo.passes()) < PRODUCTION.undo_points
    assert store.open_most <= 2
