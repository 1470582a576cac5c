"""Marks in an engine: a name and its epoch are there together after any crash, or not at all."""

from __future__ import annotations

from geomirror.volume.engine import Engine
from geomirror.volume.epoch_table import Epoch, chain_hash, empty_table
from geomirror.volume.marks import Mark
from geomirror.volume.record import RecordType
from tests.sim.disk import SimStore
from tests.volume.engine_rig import BLOCK, GENERATION, make_engine, open_engine


def write(engine: Engine, block: int, fill: bytes) -> None:
    engine.write([(int(RecordType.WRITE), 0, block * BLOCK, BLOCK, fill * BLOCK)], 5)


def sync(engine: Engine) -> None:
    job = engine.sync_job()
    job.run()
    engine.complete_sync(job)


def seal(engine: Engine, name: str = "") -> Mark | None:
    """Commit the open epoch, as that of a mark if there is a name."""
    draft = engine.cut(77, is_mark=name != "")
    assert draft is not None
    mark = Mark(name, engine.generation, draft.number, 77) if name else None
    job = engine.seal_job(draft)
    job.run()
    engine.complete_seal(job, mark)
    return mark


def persist(engine: Engine) -> None:
    job = engine.checkpoint_job()
    if job is not None:
        job.run()
        engine.complete_checkpoint(job)


def apply(engine: Engine, through: int) -> None:
    persist(engine)
    job = engine.apply_job(through)
    job.run()
    engine.complete_apply(job)
    persist(engine)


def names(engine: Engine) -> dict[str, int]:
    return {mark.name: mark.epoch for mark in engine.marks.table.marks()}


def test_a_mark_counts_from_the_sync_that_seals_its_epoch() -> None:
    store = SimStore(1)
    engine = make_engine(store)
    write(engine, 0, b"a")
    mark = seal(engine, "first")
    assert names(engine) == {}
    assert engine.marks.latest() == {"first": mark}
    sync(engine)
    assert names(engine) == {"first": 1}
    assert engine.marks.table.marked_epochs() == (1,)
    assert engine.epoch_info(1).is_mark
    assert engine.load_epoch(1).is_mark


def test_crashes_between_a_mark_and_its_checkpoint_keep_it() -> None:
    for steps in range(5):
        store = SimStore(steps)
        engine = make_engine(store)
        write(engine, 0, b"a")
        seal(engine, "first")
        sync(engine)
        if steps >= 1:
            persist(engine)
        if steps >= 2:
            apply(engine, 1)
        if steps >= 3:
            write(engine, 1, b"b")
            seal(engine)
            sync(engine)
            apply(engine, 2)
        if steps >= 4:
            engine.marks.put(engine.marks.table.get("first")._replace(is_quiesced=True))
            sync(engine)
        for seed in range(3):
            store.crash()
            engine = open_engine(store, seed)
            assert names(engine) == {"first": 1}, steps
            assert engine.marks.table.marked_epochs() == (1,)
            assert engine.marks.table.get("first").is_quiesced == (steps >= 4)


def test_a_mark_without_a_durable_epoch_never_was() -> None:
    store = SimStore(3)
    engine = make_engine(store)
    write(engine, 0, b"a")
    sync(engine)
    seal(engine, "ghost")
    store.crash()
    engine = open_engine(store)
    assert engine.sealed_epoch == 0
    # The number goes to another epoch, which nobody has named.
    seal(engine)
    sync(engine)
    for seed in range(2):
        store.crash()
        engine = open_engine(store, seed)
        assert engine.sealed_epoch == 1
        assert names(engine) == {}
        assert engine.marks.table.marked_epochs() == ()


def test_the_name_record_alone_durable_names_no_later_epoch() -> None:
    store = SimStore(4)
    engine = make_engine(store)
    write(engine, 0, b"a")
    # As a crash leaves it between two records of one append.
    engine.marks.name_next(Mark("ghost", GENERATION, 1, 1))
    sync(engine)
    store.crash()
    engine = open_engine(store)
    assert engine.sealed_epoch == 0
    seal(engine, "real")
    sync(engine)
    store.crash()
    engine = open_engine(store, 1)
    assert names(engine) == {"real": 1}


def test_a_removed_mark_stays_removed() -> None:
    store = SimStore(5)
    engine = make_engine(store)
    write(engine, 0, b"a")
    mark = seal(engine, "first")
    assert mark is not None
    sync(engine)
    end_lsn = engine.marks.remove(mark)
    assert names(engine) == {"first": 1}  # Until that is durable.
    assert not engine.marks.is_settled
    sync(engine)
    assert engine.journal.durable_lsn >= end_lsn
    assert names(engine) == {}
    assert engine.marks.is_settled
    for seed in range(2):
        store.crash()
        engine = open_engine(store, seed)
        assert names(engine) == {}
    apply(engine, 1)
    store.crash()
    assert names(open_engine(store, 3)) == {}


def test_no_checkpoint_skips_a_change_that_is_not_durable_yet() -> None:
    store = SimStore(6)
    engine = make_engine(store)
    write(engine, 0, b"a")
    mark = seal(engine, "first")
    assert mark is not None
    sync(engine)
    apply(engine, 1)
    lsn = engine.journal.end_lsn
    job = engine.sync_job()
    end_lsn = engine.marks.remove(mark)
    job.run()
    engine.complete_sync(job)
    persist(engine)
    assert engine.scan_lsn <= lsn < end_lsn
    sync(engine)
    store.crash()
    assert names(open_engine(store)) == {}


def test_hundreds_of_marks_without_a_write_in_between() -> None:
    store = SimStore(7)
    engine = make_engine(store)
    write(engine, 0, b"a")
    for number in range(1, 301):
        seal(engine, f"mark-{number}")
        sync(engine)
    write(engine, 0, b"b")
    sync(engine)
    for seed in range(3):
        store.crash()
        engine = open_engine(store, seed)
        assert engine.sealed_epoch == 300 + seed
        assert len(names(engine)) == 300
        assert engine.read(0, 0, BLOCK) == (b"b" if seed == 0 else b"c") * BLOCK
        assert engine.open_epoch_entries == 1
        write(engine, 0, b"c")
        seal(engine)
        sync(engine)
        write(engine, 0, b"c")
        sync(engine)


def secondary_epoch(number: int, first: int, previous: bytes, *, is_mark: bool) -> Epoch:
    table = empty_table()
    digest = chain_hash(previous, GENERATION, number, number, number, table)
    return Epoch(
        number,
        first,
        GENERATION,
        number,
        number,
        9,
        digest,
        table,
        is_asserted=first < number,
        is_mark=is_mark,
    )


def test_a_secondary_holds_the_mark_that_comes_with_its_commit() -> None:
    store = SimStore(8)
    engine = make_engine(store, role="secondary")
    engine.superblock.data_state = "consistent"
    fold = secondary_epoch(5, 1, bytes(32), is_mark=True)
    engine.commit(fold, 9, Mark("first", GENERATION, 5, 9))
    sync(engine)
    assert names(engine) == {"first": 5}
    assert engine.marks.table.marked_epochs() == (5,)
    persist(engine)
    store.crash()
    engine = open_engine(store)
    assert engine.marks.table.marked_epochs() == (5,)


def test_a_copy_that_is_made_anew_holds_no_older_mark() -> None:
    store = SimStore(9)
    engine = make_engine(store, role="secondary")
    engine.superblock.data_state = "consistent"
    first = secondary_epoch(1, 1, bytes(32), is_mark=True)
    engine.commit(first, 9, Mark("first", GENERATION, 1, 9))
    sync(engine)
    apply(engine, 1)
    engine.reset_position(engine.generation, 20, b"h" * 32, data_state="inconsistent")
    engine.superblock.consistent_from = 25
    assert engine.marks.table.marked_epochs() == ()
    persist(engine)
    store.crash()
    engine = open_engine(store)
    assert names(engine) == {"first": 1}
    assert engine.marks.table.marked_epochs() == ()
    # What comes before the end of the resync is no state of this copy, what comes after it is.
    inside = secondary_epoch(21, 21, b"h" * 32, is_mark=True)
    engine.commit(inside, 9, Mark("inside", GENERATION, 21, 9))
    after = secondary_epoch(25, 22, inside.chain_hash, is_mark=True)
    engine.commit(after, 9, Mark("after", GENERATION, 25, 9))
    sync(engine)
    assert engine.marks.table.marked_epochs() == (25,)
    store.crash()
    engine = open_engine(store, 1)
    assert names(engine) == {"first": 1, "inside": 21, "after": 25}
    assert engine.marks.table.marked_epochs() == (25,)


def test_a_copy_that_is_there_again_after_a_crash_holds_its_marks_again() -> None:
    store = SimStore(10)
    engine = make_engine(store, role="secondary")
    engine.superblock.data_state = "consistent"
    first = secondary_epoch(1, 1, bytes(32), is_mark=True)
    engine.commit(first, 9, Mark("first", GENERATION, 1, 9))
    sync(engine)
    apply(engine, 1)
    persist(engine)
    engine.reset_position(engine.generation, 20, b"h" * 32, data_state="inconsistent")
    engine.superblock.consistent_from = -1
    # A name comes just then, so the file of marks is written; the power goes before the superblock.
    engine.marks.put(Mark("again", GENERATION, 1, 9))
    sync(engine)
    assert engine.marks.table.marked_epochs() == ()
    job = engine.checkpoint_job()
    assert job is not None
    assert job.marks is not None
    job.marks.run()
    store.crash()
    engine = open_engine(store, 1)
    assert engine.superblock.data_state == "consistent"
    assert engine.marks.table.marked_epochs() == (1,)
    assert names(engine)["again"] == 1
    # With the superblock the file may still say it; nobody reads it as if it were true.
    engine.reset_position(engine.generation, 20, b"h" * 32, data_state="inconsistent")
    engine.superblock.consistent_from = -1
    job = engine.checkpoint_job()
    assert job is not None
    job.run()
    store.crash()
    engine = open_engine(store, 2)
    assert engine.superblock.data_state == "inconsistent"
    assert engine.marks.table.marked_epochs() == ()
