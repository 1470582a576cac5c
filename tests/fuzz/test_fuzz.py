"""Every target with every kept input and with changed ones; and whether targets can fail at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from geomirror.volume import recovery
from geomirror.wan_protocol import epoch_decode
from tests.fuzz import corpus
from tests.fuzz.engines import hypothesis_round

EXAMPLES = 60
KEPT_BYTES_MAX = 2 << 20


@pytest.mark.parametrize("name", corpus.names())
def test_every_kept_input_keeps_the_invariants(name: str) -> None:
    target = corpus.load(name)
    found = corpus.inputs(name)
    assert found, "a target without a single good input reaches nothing"
    for data in found:
        target.run(data)


@pytest.mark.parametrize("name", corpus.names())
def test_changed_inputs_keep_the_invariants(name: str) -> None:
    hypothesis_round(name, EXAMPLES, None)()


def test_the_corpus_belongs_to_targets_and_is_small() -> None:
    assert {path.name for path in corpus.CORPUS.iterdir()} <= set(corpus.names())
    sizes = [path.stat().st_size for name in corpus.names() for path in corpus.kept(name)]
    assert sum(sizes) < KEPT_BYTES_MAX


# A target that cannot fail proves nothing: planted bugs have to be found.


def test_a_recovery_that_cuts_durable_records_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_prove", lambda log, scan, known, resource: scan.position)
    found = []
    for data in corpus.inputs("journal"):
        try:
            corpus.load("journal").run(data)
        except AssertionError as error:
            found.append(str(error))
    assert any("proven durable" in each for each in found)


def test_a_frame_whose_hash_is_not_looked_at_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def expand(entries, data, volume_bytes):
        table = real(entries, data, volume_bytes)
        table["digest_low"] ^= 1
        return table

    real = epoch_decode._expand
    monkeypatch.setattr(epoch_decode, "_expand", expand)
    with pytest.raises(AssertionError):
        for data in corpus.inputs("wan_frame"):
            corpus.load("wan_frame").run(data)


def test_an_answer_that_depends_on_the_cut_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    target = corpus.load("nbd_server")

    def parsed(pieces, kind):
        return (*real(pieces, kind), len(pieces) > 1)

    real = target._parsed
    monkeypatch.setattr(target, "_parsed", parsed)
    with pytest.raises(AssertionError, match="by cut"):
        target.run(target.seeds()[0])


def test_minimising_keeps_only_what_takes_new_steps() -> None:
    seeds = corpus.load("token").seeds()
    assert corpus.minimise("token", seeds) == []
    damaged = b"\0gm1.AAAA"
    assert corpus.minimise("token", [damaged, damaged, damaged + b"AAAA"]) == [damaged]


def test_the_command_replays_an_input_and_says_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"[node]\nworker_threads = 3\n")
    command = [sys.executable, "-m", "tests.fuzz", "config", "--replay", str(path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
